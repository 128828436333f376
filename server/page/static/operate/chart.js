// Small line charts as SVG. Each has a description in words for screen readers.
import { html } from "../app/ui.js";

const WIDTH = 240;
const HEIGHT = 48;
const MARGIN = 4;

// values: numbers, or null where nothing was measured. A gap in the line is a gap in the measurements.
export function Sparkline({ title, values, show, most = null }) {
  const known = values.filter((value) => value !== null);
  const top = most ?? Math.max(...known, Number.MIN_VALUE);
  const last = known.at(-1);
  const words = known.length ? `now ${show(last)}, highest ${show(Math.max(...known))}` : "nothing measured yet";
  const x = (i) => MARGIN + (i * (WIDTH - 2 * MARGIN)) / Math.max(1, values.length - 1);
  const { line, dots } = pathsOf(values, x, (v) => HEIGHT - MARGIN - (v / top) * (HEIGHT - 2 * MARGIN));
  return html`<figure class="spark">
    <figcaption><span>${title}</span> <strong>${known.length ? show(last) : "–"}</strong></figcaption>
    <svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label=${`${title}: ${words}`}>
      <path d=${line} /><path class="dots" d=${dots} /></svg>
    <p class="small" aria-hidden="true">${known.length ? `highest ${show(Math.max(...known))}` : words}</p>
  </figure>`;
}

// A line through the values, and a dot for each value without neighbours, because no line shows it.
function pathsOf(values, x, y) {
  let [line, dots] = ["", ""];
  values.forEach((value, index) => {
    if (value === null) return;
    const point = `${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    const [hasBefore, hasAfter] = [index - 1, index + 1].map((near) => (values[near] ?? null) !== null);
    if (hasBefore) line += `L${point}`;
    else if (hasAfter) line += `M${point}`;
    else dots += `M${point}h.01`;
  });
  return { line, dots };
}

const PLOT = { width: 560, height: 200, left: 46, right: 10, top: 10, bottom: 26 };

// series: [{ name, points: [[x, y], …] }] over a common pair of axes.
export function LineChart({ title, series, xLabel }) {
  const points = series.flatMap((line) => line.points);
  if (!points.length) return html`<p class="hint">Nothing measured yet.</p>`;
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(0, ...ys), Math.max(...ys) || 1];
  const { width, height, left, right, top, bottom } = PLOT;
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const words = series.map((line) => `${line.name} from ${line.points[0]?.[1].toFixed(3)} to ${line.points.at(-1)?.[1].toFixed(3)}`).join("; ");
  return html`<figure class="plot"><svg viewBox=${`0 0 ${width} ${height}`} role="img" aria-label=${`${title}: ${words}`}>
    ${[0, 0.5, 1].map((part) => {
      const value = y0 + part * (y1 - y0);
      return html`<g key=${part}><line class="rule" x1=${left} x2=${width - right} y1=${y(value)} y2=${y(value)} />
        <text x=${left - 6} y=${y(value) + 4} text-anchor="end">${value.toPrecision(3)}</text></g>`;
    })}
    <text x=${left} y=${height - 6}>${x0}</text><text x=${width - right} y=${height - 6} text-anchor="end">${xLabel} ${x1}</text>
    ${series.map((line, index) => html`<path key=${line.name} class=${`series-${index + 1}`}
      d=${line.points.map(([px, py], i) => `${i ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("")} />`)}
  </svg><figcaption>${series.map((line, index) => html`<span key=${line.name} class=${`key series-${index + 1}`}>${line.name}</span>`)}</figcaption></figure>`;
}
