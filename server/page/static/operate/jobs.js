// Training jobs with their loss curves, where the server trains (OpenAI's shape of fine-tuning jobs).
import { getJson, send } from "../app/api.js";
import { adminKey } from "../app/session.js";
import { count } from "../app/format.js";
import { html, useEffect, useEvery, useRef, useState, useValue } from "../app/ui.js";
import { Outcome, useAction } from "./action.js";
import { LineChart } from "./chart.js";

const EVERY_MS = 5000;
const PATH = "v1/fine_tuning/jobs";
const UNFINISHED = ["validating_files", "queued", "running", "paused"];
const asWho = () => ({ admin: Boolean(adminKey.get()), quiet: true });

export function Jobs() {
  const [found, setFound] = useState(null); // null: this server trains nothing, or not for this key
  const [chosen, setChosen] = useState("");
  const [run, state] = useAction();
  const isAbsent = useRef(false);
  const look = async () => {
    if (isAbsent.current) return;
    try {
      setFound((await getJson(`${PATH}?limit=50`, asWho())).data);
    } catch (failure) {
      setFound(null);
      isAbsent.current = failure.status >= 400 && failure.status < 500; // not here, or not for this key
    }
  };
  const key = useValue(adminKey);
  useEffect(() => {
    isAbsent.current = false;
  }, [key]);
  useEvery(EVERY_MS, look, [key]);
  if (!found) return null;
  const cancel = (id) => run(() => send(`${PATH}/${id}/cancel`, { ...asWho(), method: "POST", body: {} }).then(look), () => "The job is cancelled.");
  return html`<section class="panel" aria-labelledby="jobs"><h2 id="jobs">Training jobs</h2>
    ${found.length === 0 ? html`<p class="hint">None yet.</p>` : html`<div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table>
      <thead><tr><th>Job</th><th>State</th><th>Adapter</th><th class="number">Tokens</th><th>Begun</th><th>Change</th></tr></thead>
      <tbody>${found.map((job) => html`<tr key=${job.id}><th scope="row">${job.id}</th>
        <td class=${job.status === "failed" ? "bad" : ""}>${job.status}${job.error?.message && html`<br /><small>${job.error.message}</small>`}</td>
        <td>${job.fine_tuned_model ?? "–"}</td><td class="number">${count(job.trained_tokens)}</td><td>${new Date(job.created_at * 1000).toLocaleString()}</td>
        <td class="actions"><button type="button" class="quiet" aria-pressed=${chosen === job.id} onClick=${() => setChosen(chosen === job.id ? "" : job.id)}>Loss</button>
          ${UNFINISHED.includes(job.status) && html`<button type="button" class="quiet" aria-label=${`Cancel ${job.id}`} onClick=${() => cancel(job.id)}>Cancel</button>`}</td></tr>`)}</tbody></table></div>`}
    <${Outcome} state=${state} />
    ${chosen && html`<${Curve} key=${chosen} id=${chosen} />`}
  </section>`;
}

function Curve({ id }) {
  const [events, setEvents] = useState(null);
  useEvery(EVERY_MS, async () => {
    try {
      setEvents(await allEvents(id));
    } catch {
      setEvents([]);
    }
  }, [id]);
  if (!events) return html`<p class="hint">Asking …</p>`;
  const line = (name, field) => ({ name, points: events.map(({ data }) => [data?.step, data?.[field]]).filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y)) });
  const series = [line("training loss", "train_loss"), line("validation loss", "valid_loss")].filter(({ points }) => points.length);
  return html`<${LineChart} title=${`Loss of ${id}`} series=${series} xLabel="step" />`;
}

// The events that carry numbers, the oldest first. They come in pages, the latest first.
async function allEvents(id) {
  const found = [];
  let after = "";
  for (let page = 0; page < 100; page += 1) {
    const { data, has_more: hasMore } = await getJson(`${PATH}/${id}/events?limit=100${after}`, asWho());
    found.push(...data.filter((event) => event.type === "metrics"));
    if (!hasMore || !data.length) break;
    after = `&after=${encodeURIComponent(data.at(-1).id)}`;
  }
  return found.sort((a, b) => (a.data?.step ?? 0) - (b.data?.step ?? 0));
}
