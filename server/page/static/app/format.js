// Numbers, times and names as they are shown.
const whole = new Intl.NumberFormat("en");

export const count = (n) => (n === null || n === undefined ? "–" : whole.format(n));

export function bytes(n) {
  if (n === null || n === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) {
    n /= 1024;
    i += 1;
  }
  return `${i === 0 ? n : n.toPrecision(3)} ${units[i]}`;
}

export function seconds(s) {
  if (s === null || s === undefined || Number.isNaN(s)) return "–";
  if (s < 1) return `${s < 0.01 ? (s * 1000).toFixed(1) : Math.round(s * 1000)} ms`;
  return `${s < 10 ? s.toFixed(2) : s.toFixed(1)} s`;
}

export const percent = (p, digits = 0) => `${(100 * p).toFixed(digits)} %`;

// A mixture as a sum: "0.5 × a − 1.25 × b". pairs: [name, scale].
export const asSum = (pairs) => pairs.map(([name, scale], index) => {
  const sign = scale < 0 ? (index ? " − " : "−") : index ? " + " : "";
  return `${sign}${Math.abs(scale)} × ${name}`;
}).join("");

// The first digits of a version, or of each version of a mixture.
export const shortVersion = (text) => (text ?? "").split(",").map((version) => version.slice(0, 8)).join(" + ");

export function ago(epochSeconds) {
  if (!epochSeconds) return "never";
  const past = Math.max(0, Date.now() / 1000 - epochSeconds);
  if (past < 60) return "just now";
  const [unit, size] = past < 3600 ? ["min", 60] : past < 86400 ? ["h", 3600] : ["d", 86400];
  return `${Math.floor(past / size)} ${unit} ago`;
}

export function until(epochSeconds) {
  const left = Math.max(0, epochSeconds - Date.now() / 1000);
  if (left < 60) return "less than a minute left";
  return left < 5400 ? `about ${Math.round(left / 60)} min left` : `about ${Math.round(left / 3600)} h left`;
}

export function day(milliseconds) {
  const then = new Date(milliseconds);
  const today = new Date().toDateString() === then.toDateString();
  return today
    ? then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : then.toLocaleDateString([], { day: "numeric", month: "short" });
}

// Lets the browser save a text as a file.
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export function newId() {
  const numbers = crypto.getRandomValues(new Uint8Array(12)); // browsers have randomUUID on https and localhost only
  return [...numbers].map((n) => n.toString(16).padStart(2, "0")).join("");
}
