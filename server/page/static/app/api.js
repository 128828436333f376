// Requests to this server. Every failure is an ApiFailure with a message to show.
import { adminKey, apiKey, keyWanted } from "./session.js";
import { cell } from "./ui.js";

// "ready", "loading", "draining", "unavailable", or "unreachable".
export const serverState = cell("ready");

export class ApiFailure extends Error {
  constructor({ status = 0, code = null, message, retryAfter = null, requestId = null }) {
    super(message);
    Object.assign(this, { status, code, retryAfter, requestId });
  }
}

const UNREACHABLE = "The server can't be reached. It may be restarting, or the network is down.";

export function address(path) {
  return new URL(path.replace(/^\//, ""), document.baseURI).href;
}

function authorization(admin) {
  const key = admin ? adminKey.get() : apiKey.get() || adminKey.get();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// The response of a request that succeeded. `admin` sends the admin key; `quiet` does not ask the reader for a key after
// 401. Throws ApiFailure, or AbortError on `signal`.
export async function send(path, { method = "GET", body, admin = false, signal, quiet = false } = {}) {
  const headers = { Accept: "application/json", ...authorization(admin) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method, headers, signal, credentials: "omit", cache: "no-store", redirect: "error", referrerPolicy: "no-referrer",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    serverState.set("unreachable");
    throw new ApiFailure({ code: "unreachable", message: UNREACHABLE });
  }
  if (serverState.get() === "unreachable") serverState.set("ready");
  if (response.ok) return response;
  const failure = await failureOf(response);
  if (failure.status === 401 && !quiet) keyWanted.set(admin ? "admin" : "api");
  throw failure;
}

export async function getJson(path, options) {
  return (await send(path, options)).json();
}

async function failureOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not JSON: a proxy between the page and the server answered
  }
  const wait = Number(response.headers.get("Retry-After"));
  return new ApiFailure({
    status: response.status,
    code: error.code ?? null,
    message: sentence(error.message ?? `The server answered with status ${response.status}`),
    retryAfter: wait > 0 ? wait : null,
    requestId: response.headers.get("X-Request-Id"),
  });
}

// The server's messages begin with a small letter and have no full stop: they are parts of log lines too.
export function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

// Asks the server whether it is ready, and sets `serverState`.
export async function checkHealth() {
  try {
    const response = await fetch(address("health/ready"), { cache: "no-store", credentials: "omit" });
    const { status } = await response.json();
    serverState.set(response.ok ? "ready" : ["loading", "draining"].includes(status) ? status : "unavailable");
  } catch {
    serverState.set("unreachable");
  }
}
