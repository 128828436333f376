// The system prompt and how answers are sampled, with the server's defaults where a field is left empty.
import { changed } from "./conversations.js";
import { defaultsOf } from "../app/models.js";
import { FIELDS } from "../app/sampling.js";
import { html } from "../app/ui.js";

export function SamplingPanel({ conversation, onClose }) {
  const { sampling } = conversation;
  const defaults = defaultsOf(conversation.model);
  const set = (name, value) => {
    if (value === undefined) delete sampling[name];
    else sampling[name] = value;
    changed(conversation);
  };
  return html`<aside class="settings" id="settings" aria-label="Settings of this conversation"
      onKeyDown=${(event) => { if (event.key === "Escape") { event.stopPropagation(); onClose(); } }}>
    <label for="system">System prompt</label>
    <textarea id="system" rows="2" value=${conversation.system} placeholder="none: the model's own"
      onInput=${(e) => { conversation.system = e.currentTarget.value; }} onChange=${() => changed(conversation)} />
    <div class="fields">${FIELDS.map((field) => html`<${NumberField} key=${field.name} field=${field}
      value=${sampling[field.name]} fallback=${defaults?.[field.name]} onChange=${(value) => set(field.name, value)} />`)}
      <div><label for="stop">Stop texts, one a line</label>
        <textarea id="stop" rows="1" value=${sampling.stop ?? ""} onChange=${(e) => set("stop", e.currentTarget.value || undefined)} /></div>
    </div>
    <label class="check"><input type="checkbox" checked=${sampling.probabilities !== false}
      onChange=${(e) => set("probabilities", e.currentTarget.checked ? undefined : false)} />
      Ask for the probabilities of the tokens</label>
    <div class="buttons"><button type="button" onClick=${onClose}>Close</button>
      <button type="button" onClick=${() => { conversation.sampling = {}; changed(conversation); }}>Use the server's defaults</button></div>
  </aside>`;
}

export function NumberField({ field, value, fallback, onChange, prefix = "set" }) {
  const { name, label, min, max, step, help } = field;
  const id = `${prefix}-${name}`;
  const read = (event) => {
    const text = event.currentTarget.value;
    onChange(text === "" || !Number.isFinite(Number(text)) ? undefined : Number(text));
  };
  return html`<div><label for=${id}>${label}</label>
    <input id=${id} type="number" inputmode="decimal" min=${min} max=${max} step=${step} value=${value ?? ""}
      placeholder=${fallback === undefined ? "" : `default ${fallback}`} aria-describedby=${`${id}-help`} onChange=${read} />
    <small id=${`${id}-help`}>${help}</small></div>`;
}
