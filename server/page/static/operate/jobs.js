// Training jobs with their loss curves, if the server trains (OpenAI's fine-tuning jobs).
import { refreshAdmin } from "./admin.js";
import { getJson, send } from "../app/api.js";
import { count, until } from "../app/format.js";
import { refreshModels } from "../app/models.js";
import { adminKey, apiKey } from "../app/session.js";
import { html, useEffect, useEvery, useRef, useState, useValue } from "../app/ui.js";
import { Outcome, useAction } from "./action.js";
import { LineChart } from "./chart.js";

const EVERY_MS = 5000;
const PATH = "v1/fine_tuning/jobs";
const UNFINISHED = ["validating_files", "queued", "running", "paused"];
const MOST_PAGES = 200;

// A job belongs to the key that created it, so each key of this tab is asked.
const keysToAsk = () => [...(adminKey.get() ? [true] : []), ...(apiKey.get() || !adminKey.get() ? [false] : [])];

export function Jobs() {
  const [found, setFound] = useState(null); // null: this server trains nothing, or not for these keys
  const [unavailable, setUnavailable] = useState("");
  const [chosen, setChosen] = useState("");
  const [run, state] = useAction();
  const absent = useRef(new Set()); // keys that were refused: asking again with them would change nothing
  const before = useRef({}); // the status of each job at the last look
  const keys = useValue(adminKey) + useValue(apiKey);
  const look = async () => {
    const asked = await Promise.all(keysToAsk().filter((admin) => !absent.current.has(admin)).map(async (admin) => {
      try {
        return (await getJson(`${PATH}?limit=50`, { admin, quiet: true })).data.map((job) => ({ ...job, admin }));
      } catch (failure) {
        if (failure.status >= 400 && failure.status < 500) absent.current.add(admin);
        if (failure.code === "training_unavailable") setUnavailable(failure.message);
        return null;
      }
    }));
    const lists = asked.filter(Boolean);
    const jobs = [...new Map(lists.flat().map((job) => [job.id, job])).values()].sort((a, b) => b.created_at - a.created_at);
    setFound(lists.length ? jobs : null);
    if (jobs.some(({ id, status }) => status === "succeeded" && UNFINISHED.includes(before.current[id]))) {
      refreshModels(); // the new adapter can be chosen at once
      refreshAdmin();
    }
    before.current = Object.fromEntries(jobs.map(({ id, status }) => [id, status]));
  };
  useEffect(() => {
    absent.current.clear();
    setUnavailable("");
  }, [keys]);
  useEvery(EVERY_MS, look, [keys]);
  if (!found) return unavailable && html`<section class="panel"><h2>Training jobs</h2><p class="hint">${unavailable}</p></section>`;
  const cancel = ({ id, admin }) => run(
    () => send(`${PATH}/${id}/cancel`, { admin, quiet: true, method: "POST", body: {} }).then(look), () => "The job is cancelled.",
  );
  const shown = found.find(({ id }) => id === chosen);
  return html`<section class="panel" aria-labelledby="jobs"><h2 id="jobs">Training jobs</h2>
    ${found.length === 0 ? html`<p class="hint">None yet. A job begins with <code>POST /v1/fine_tuning/jobs</code>, as in OpenAI's clients.</p>`
      : html`<div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table>
      <thead><tr><th>Adapter</th><th>State</th><th class="number">Tokens</th><th>Created</th><th>Actions</th></tr></thead>
      <tbody>${found.map((job) => html`<${Row} key=${job.id} job=${job} isChosen=${chosen === job.id}
        onChoose=${() => setChosen(chosen === job.id ? "" : job.id)} onCancel=${() => cancel(job)} />`)}</tbody></table></div>`}
    <${Outcome} state=${state} />
    ${shown && html`<${Curve} key=${chosen} job=${shown} />`}
  </section>`;
}

function Row({ job, isChosen, onChoose, onCancel }) {
  const isOpen = UNFINISHED.includes(job.status);
  return html`<tr><th scope="row">${job.fine_tuned_model ?? job.user_provided_suffix ?? "–"}<br /><small>${job.id}</small></th>
    <td class=${job.status === "failed" ? "bad" : ""}>${job.status.replaceAll("_", " ")}
      ${isOpen && job.estimated_finish && html`<br /><small>${until(job.estimated_finish)}</small>`}
      ${job.error?.message && html`<br /><small>${job.error.message}</small>`}</td>
    <td class="number">${count(job.trained_tokens)}</td><td>${new Date(job.created_at * 1000).toLocaleString()}</td>
    <td class="actions"><button type="button" class="quiet" aria-pressed=${isChosen} aria-label=${`Loss of ${job.id}`} onClick=${onChoose}>Loss</button>
      ${isOpen && html`<button type="button" class="quiet" aria-label=${`Cancel ${job.id}`} onClick=${onCancel}>Cancel</button>`}</td></tr>`;
}

function Curve({ job }) {
  const [events, setEvents] = useState(null); // the latest first
  const known = useRef([]);
  const isOpen = UNFINISHED.includes(job.status);
  useEvery(isOpen ? EVERY_MS : 3600000, async () => {
    try {
      known.current = await withNewEvents(job, known.current);
    } catch {
      // the known events stay; the next call asks again
    }
    setEvents(known.current);
  }, [job.id, isOpen]);
  if (!events) return html`<p class="hint">Asking …</p>`;
  const measured = events.filter(({ type }) => type === "metrics").toReversed();
  const line = (name, field) => ({ name, points: measured.map(({ data }) => [data?.step, data?.[field]]).filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y)) });
  const series = [line("training loss", "train_loss"), line("validation loss", "valid_loss")].filter(({ points }) => points.length);
  return html`<p class="hint" role="status">${events[0]?.message}</p>
    <${LineChart} title=${`Loss of ${job.id}`} series=${series} xLabel="step" />`;
}

// All events of a job, the latest first: the new ones, which come in pages, and then the known ones.
async function withNewEvents({ id, admin }, known) {
  const seen = new Set(known.map((event) => event.id));
  const found = [];
  let after = "";
  for (let page = 0; page < MOST_PAGES; page += 1) {
    const { data, has_more: hasMore } = await getJson(`${PATH}/${id}/events?limit=100${after}`, { admin, quiet: true });
    const fresh = data.filter((event) => !seen.has(event.id));
    found.push(...fresh);
    if (!hasMore || fresh.length < data.length) break;
    after = `&after=${encodeURIComponent(data.at(-1).id)}`;
  }
  return [...found, ...known];
}
