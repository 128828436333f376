// Operate: the server's load, its adapters and aliases, training jobs, and the changes that the admin key allows.
import { access, drain, refreshAdmin } from "./admin.js";
import { count, percent, seconds } from "../app/format.js";
import { byLabel, lookAtMetrics, metrics, metricsProblem } from "./metrics.js";
import { models } from "../app/models.js";
import { adminKey, apiKey, keyWanted } from "../app/session.js";
import { serverState } from "../app/api.js";
import { Confirm, html, useEvery, useState, useValue } from "../app/ui.js";
import { Outcome, useAction } from "./action.js";
import { Adapters } from "./adapters.js";
import { Aliases } from "./aliases.js";
import { Sparkline } from "./chart.js";
import { Jobs } from "./jobs.js";

const METRICS_EVERY_MS = 2000;
const ADMIN_EVERY_MS = 5000;

const WORDS = {
  unknown: "",
  open: "",
  "needs a key": "Loading adapters, changing aliases and stopping the server need the server's admin key (--admin-key).",
  off: "This server was started without --admin-key, so its adapters can't be changed while it runs.",
  failed: "The server did not answer. The page asks again.",
};

export function Operate() {
  const state = useValue(access);
  const keys = useValue(adminKey) + useValue(apiKey);
  useEvery(METRICS_EVERY_MS, lookAtMetrics, [keys]);
  useEvery(ADMIN_EVERY_MS, refreshAdmin, [keys]);
  return html`<div class="page operate">
    <h1 class="unseen">Operate</h1>
    <${Load} />
    ${WORDS[state] && html`<div class="panel"><p>${WORDS[state]}</p>
      ${state === "needs a key" && html`<button type="button" class="primary" onClick=${() => keyWanted.set("admin")}>Enter the admin key</button>`}
      <${Served} /></div>`}
    ${state === "open" && html`<${Adapters} /><${Aliases} />`}
    <${Jobs} />
    ${state === "open" && html`<${Drain} />`}
  </div>`;
}

function Load() {
  const found = useValue(metrics);
  const problem = useValue(metricsProblem);
  const state = useValue(serverState);
  if (!found) return html`<section class="panel"><h2>Load</h2><p>${problem ? problem.message : "Asking …"}</p></section>`;
  const { now, history, series } = found;
  const line = (name) => history.map((sample) => sample[name]);
  const number = (n) => n.toFixed(n > 0 && n < 10 ? 1 : 0);
  return html`<section class="panel" aria-labelledby="load"><div class="titled"><h2 id="load">Load</h2>
      <span class=${`badge ${state === "ready" ? "good" : "bad"}`}>${state}</span></div>
    <div class="sparks">
      <${Sparkline} title="Running requests" values=${line("running")} show=${count} />
      <${Sparkline} title="Waiting requests" values=${line("waiting")} show=${count} />
      <${Sparkline} title="KV cache in use" values=${line("kv")} show=${(v) => percent(v, 1)} most=${1} />
      <${Sparkline} title="Step time" values=${line("step")} show=${seconds} />
      <${Sparkline} title="First token" values=${line("first")} show=${seconds} />
      <${Sparkline} title="Between tokens" values=${line("gap")} show=${seconds} />
      <${Sparkline} title="Prompt tokens/s" values=${line("prompt")} show=${number} />
      <${Sparkline} title="Answer tokens/s" values=${line("rate")} show=${number} />
    </div>
    <p class="hint">There is a point every ${METRICS_EVERY_MS / 1000} seconds, since this view was opened. Running, waiting and KV cache are
      values of that moment; the others are means since the point before.</p>
    <${ByAdapter} series=${series} rates=${now.rates} />
  </section>`;
}

function ByAdapter({ series, rates }) {
  const running = byLabel(series, "guanaco_adapter_running_sequences", "adapter");
  const requests = byLabel(series, "guanaco_adapter_requests_total", "adapter");
  const tokens = byLabel(series, "guanaco_adapter_generation_tokens_total", "adapter");
  const firstSum = byLabel(series, "guanaco_adapter_time_to_first_token_seconds_sum", "adapter");
  const firstCount = byLabel(series, "guanaco_adapter_time_to_first_token_seconds_count", "adapter");
  const names = [...new Set([...Object.keys(running), ...Object.keys(requests), ...Object.keys(tokens)])];
  if (!names.length) return html`<p class="hint">No request has come yet.</p>`;
  return html`<div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table><caption class="unseen">Requests by adapter</caption>
    <thead><tr><th>Adapter</th><th class="number">Running</th><th class="number">Tokens/s now</th><th class="number">Requests</th><th class="number">Tokens</th>
      <th class="number">First token, mean</th></tr></thead>
    <tbody>${names.map((name) => html`<tr key=${name}><th scope="row">${name}</th><td class="number">${count(running[name] ?? 0)}</td>
      <td class="number">${(rates[name] ?? 0).toFixed(1)}</td><td class="number">${count(requests[name] ?? 0)}</td>
      <td class="number">${count(tokens[name] ?? 0)}</td><td class="number">${seconds(firstCount[name] ? firstSum[name] / firstCount[name] : null)}</td></tr>`)}</tbody>
  </table></div>`;
}

// The models that this API key sees without the admin key.
function Served() {
  const known = useValue(models);
  if (!known) return null;
  const rows = [...known.base, ...known.adapters, ...known.aliases];
  return html`<div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table><caption class="unseen">Served names</caption><thead><tr><th>Name</th><th>Kind</th><th>Version</th><th>From</th></tr></thead>
    <tbody>${rows.map((card) => html`<tr key=${card.id}><th scope="row">${card.id}</th>
      <td>${card.parent ? (card.version ? "adapter" : "alias") : "base"}</td>
      <td><code>${(card.version ?? "").slice(0, 12)}</code></td><td>${card.root}</td></tr>`)}</tbody></table></div>`;
}

function Drain() {
  const [isAsking, setAsking] = useState(false);
  const [run, state] = useAction();
  return html`<section class="panel" aria-labelledby="drain"><h2 id="drain">Stop the server</h2>
    <p class="hint">Running answers may finish, new requests are refused, then the process ends. It is the same as SIGTERM.</p>
    <button type="button" class="danger" onClick=${() => setAsking(true)}>Drain and stop</button>
    <${Outcome} state=${state} />
    ${isAsking && html`<${Confirm} title="Drain and stop the server?" text="Nobody can use it afterwards until somebody starts it again." yes="Drain and stop"
      onYes=${() => run(drain, () => "The server drains: running answers may finish.")} onClose=${() => setAsking(false)} />`}
  </section>`;
}
