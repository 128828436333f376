// Mix: a slider for each adapter. The next answer is made with all of them at once.
import { changed, current, openConversation, show, startConversation } from "./conversations.js";
import { asSum } from "../app/format.js";
import { baseName, models } from "../app/models.js";
import { html, useEffect, useState, useValue } from "../app/ui.js";
import { Composer } from "./composer.js";
import { SamplingPanel } from "./settings.js";
import { ContextMeter, Thread } from "./thread.js";

const MOST = 2;
const STEP = 0.05;
let draft = null; // the last new conversation, shown again when the reader comes back from another view

export function Mix({ rest }) {
  const shown = useValue(current)?.conversation ?? null;
  const known = useValue(models);
  const [isTuning, setTuning] = useState(false);
  const id = rest[0] ?? "";
  useEffect(() => {
    if (id) openConversation(id).then((found) => { if (!found) location.hash = "#/mix"; });
    else if (shown?.kind !== "mix" && draft) show(draft);
    else if (shown?.kind !== "mix") draft = startConversation("mix", baseName() ?? "");
  }, [id]);
  useEffect(() => {
    if (shown?.kind === "mix" && !shown.model && known) {
      shown.model = baseName();
      changed(shown);
    }
  }, [known, shown]);
  if (shown?.kind !== "mix") return null;
  const scales = Object.entries(shown.mixture).filter(([, scale]) => scale !== 0);
  const set = (name, scale) => {
    if (scale) shown.mixture[name] = scale;
    else delete shown.mixture[name];
    changed(shown);
  };
  const inWords = scales.length ? asSum(scales) : "the base alone";
  return html`<div class="mix">
    <h1 class="unseen">Mix</h1>
    <section class="sliders" aria-label="Mixture">
      <h2>Mixture</h2>
      <p class="hint">0 leaves an adapter out, 1 is the adapter as it is, and below 0 its effect is subtracted. The next answer uses these numbers.</p>
      ${known?.adapters.length === 0 && html`<p class="note">This server has no adapters to mix.</p>`}
      ${known?.adapters.map(({ id: name }) => html`<${Slider} key=${name} name=${name} value=${shown.mixture[name] ?? 0} onChange=${(scale) => set(name, scale)} />`)}
      ${gone(shown, known).map((name) => html`<p key=${name} class="note">${name} is not served any more.
        <button type="button" class="quiet" onClick=${() => set(name, 0)}>Leave it out</button></p>`)}
      <div class="buttons"><button type="button" disabled=${!scales.length} onClick=${() => { shown.mixture = {}; changed(shown); }}>All to 0</button>
        <a class="button" href="#/mix" onClick=${() => { startConversation("mix", baseName() ?? "").mixture = { ...shown.mixture }; }}>New conversation</a></div>
    </section>
    <section class="talk" aria-label="Conversation">
      <div class="bar"><span>Mixture: <strong>${inWords}</strong></span><${ContextMeter} conversation=${shown} />
        <button type="button" class="push" aria-expanded=${isTuning} aria-controls="settings" onClick=${() => setTuning(!isTuning)}>Settings</button></div>
      ${isTuning && html`<${SamplingPanel} conversation=${shown} onClose=${() => setTuning(false)} />`}
      <${Thread} conversation=${shown} empty=${html`<div class="empty"><h2>Move the sliders, then ask</h2>
        <p class="hint">Ask, move them, and press Retry: both answers are kept as branches.</p></div>`} />
      <${Composer} conversation=${shown} />
    </section>
  </div>`;
}

function Slider({ name, value, onChange }) {
  const id = `mix-${name}`;
  return html`<div class="slider">
    <label for=${id}>${name}</label><output for=${id}>${value.toFixed(2)}</output>
    <input id=${id} type="range" min=${-MOST} max=${MOST} step=${STEP} value=${value}
      onInput=${(e) => onChange(Number(Number(e.currentTarget.value).toFixed(2)))} onDblClick=${() => onChange(0)} />
    <span class="ticks" aria-hidden="true"><span>−2</span><span>−1</span><span>0</span><span>1</span><span>2</span></span>
  </div>`;
}

function gone(conversation, known) {
  if (!known) return [];
  const served = new Set([...known.adapters, ...known.aliases].map((card) => card.id));
  return Object.keys(conversation.mixture).filter((name) => !served.has(name));
}
