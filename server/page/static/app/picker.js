// Lets the reader choose the model: the base, an adapter or an alias.
import { models, modelsProblem, refreshModels } from "./models.js";
import { html, useValue } from "./ui.js";
import { count, shortVersion } from "./format.js";

const GROUPS = [["base", "Base"], ["adapters", "Adapters"], ["aliases", "Aliases"]];

export function Picker({ id, label, value, onChange, disabled = false }) {
  const known = useValue(models);
  const names = known ? GROUPS.flatMap(([group]) => known[group].map((card) => card.id)) : [];
  return html`<span class="picker"><label for=${id}>${label}</label>
    <select id=${id} value=${value} disabled=${disabled} onChange=${(e) => onChange(e.currentTarget.value)}>
      ${value && !names.includes(value) && html`<option value=${value}>${value} (not served now)</option>`}
      ${known && GROUPS.map(([group, title]) => known[group].length > 0 && html`<optgroup key=${group} label=${title}>
        ${known[group].map((card) => html`<option key=${card.id} value=${card.id}>${card.id}</option>`)}
      </optgroup>`)}
    </select></span>`;
}

// Shown in an empty conversation: all models of this server, to be chosen by a click.
export function Introduction({ chosen, onChoose }) {
  const known = useValue(models);
  const problem = useValue(modelsProblem);
  if (!known) {
    return problem
      ? html`<div class="empty"><p>${problem.message}</p><button type="button" onClick=${() => refreshModels(true)}>Try again</button></div>`
      : html`<div class="empty"><p>Asking the server what it serves …</p></div>`;
  }
  return html`<div class="empty">
    <h2>Who should answer?</h2>
    <p class="hint">The base is the model itself. An adapter is a small change on top of it; an alias is another name for an adapter.</p>
    <ul class="cards">
      ${GROUPS.flatMap(([group, title]) => known[group].map((card) => html`<li key=${card.id}>
        <button type="button" aria-pressed=${card.id === chosen} onClick=${() => onChoose(card.id)}>
          <strong>${card.id}</strong>
          <small>${describe(card, group, title)}</small>
        </button></li>`))}
    </ul>
  </div>`;
}

function describe(card, group, title) {
  if (group === "base") return `base, context of ${count(card.max_model_len)} tokens`;
  return card.version ? `adapter, version ${shortVersion(card.version)}` : `${title === "Aliases" ? "alias" : "adapter"}, leads to ${card.root}`;
}
