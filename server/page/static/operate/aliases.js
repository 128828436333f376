// Aliases: names that lead to adapters, split by weight.
import { aliases, putAlias, removeAlias, rollbackAlias } from "./admin.js";
import { models } from "../app/models.js";
import { count } from "../app/format.js";
import { Confirm, html, useState, useValue } from "../app/ui.js";
import { Outcome, useAction } from "./action.js";

const NEW = { name: "", targets: [["", 1]], revision: 0 };

export function Aliases() {
  const cards = useValue(aliases) ?? [];
  const [run, state] = useAction();
  const [form, setForm] = useState(NEW);
  const [asking, setAsking] = useState(null);
  const change = (card) => setForm({ name: card.name, targets: Object.entries(card.split), revision: card.revision });
  return html`<section class="panel" aria-labelledby="aliases"><h2 id="aliases">Aliases</h2>
    ${cards.length === 0 ? html`<p class="hint">None yet. An alias is a name that leads to an adapter, or to several by weight.</p>` : html`<div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table>
      <thead><tr><th>Name</th><th>State</th><th>Leads to</th><th class="number">Revision</th><th class="number">Uses</th><th>Actions</th></tr></thead>
      <tbody>${cards.map((card) => html`<tr key=${card.name}><th scope="row">${card.name}</th><td class=${card.state === "ready" ? "" : "bad"}>${card.state}</td>
        <td><${Split} split=${card.split} /></td><td class="number">${card.revision}</td><td class="number">${count(card.num_uses)}</td>
        <td class="actions"><button type="button" class="quiet" aria-label=${`Change ${card.name}`} onClick=${() => change(card)}>Change</button>
          ${card.revision > 1 && html`<button type="button" class="quiet" aria-label=${`Roll back ${card.name}`} onClick=${() => run(() => rollbackAlias(card.name), () => `${card.name} leads where it led before.`)}>Roll back</button>`}
          <button type="button" class="quiet" aria-label=${`Remove ${card.name}`} onClick=${() => setAsking(card.name)}>Remove</button></td></tr>`)}</tbody></table></div>`}
    <${AliasForm} form=${form} setForm=${setForm} run=${run} />
    <${Outcome} state=${state} />
    ${asking && html`<${Confirm} title=${`Remove the alias ${asking}?`} text="Requests by this name are refused from then on. What it leads to stays." yes="Remove"
      onClose=${() => setAsking(null)} onYes=${() => run(() => removeAlias(asking), () => `The alias ${asking} is removed.`)} />`}
  </section>`;
}

function Split({ split }) {
  const total = Object.values(split).reduce((sum, weight) => sum + weight, 0) || 1;
  return html`<ul class="split">${Object.entries(split).map(([target, weight]) => html`<li key=${target}>
    <meter min="0" max=${total} value=${weight} aria-hidden="true"></meter> ${target.replace(/@([0-9a-f]{8})[0-9a-f]+/, "@$1")} ${Math.round((100 * weight) / total)} %</li>`)}</ul>`;
}

function AliasForm({ form, setForm, run }) {
  const known = useValue(models);
  const set = (index, place, value) => setForm({ ...form, targets: form.targets.with(index, form.targets[index].with(place, value)) });
  const save = async (event) => {
    event.preventDefault();
    const split = Object.fromEntries(form.targets.filter(([name]) => name.trim()).map(([name, weight]) => [name.trim(), Math.max(0, Math.round(Number(weight)))]));
    const worked = await run(() => putAlias(form.name.trim(), split, form.revision), (card) => `${card.name} leads to ${Object.keys(card.split).join(", ")}.`);
    if (worked) setForm(NEW);
  };
  return html`<form class="inline" onSubmit=${save}><h3>${form.revision ? `Change ${form.name}` : "New alias"}</h3>
    <div><label for="alias-name">Name</label><input id="alias-name" required maxlength="64" disabled=${form.revision > 0} value=${form.name}
      onInput=${(e) => setForm({ ...form, name: e.currentTarget.value })} /></div>
    ${form.targets.map(([name, weight], index) => html`<fieldset class="grow target" key=${index}><legend class="unseen">Target ${index + 1}</legend>
      <div class="grow"><label for=${`target-${index}`}>Target</label><input id=${`target-${index}`} required list="targets" value=${name} onInput=${(e) => set(index, 0, e.currentTarget.value)} /></div>
      <div><label for=${`weight-${index}`}>Weight</label><input id=${`weight-${index}`} type="number" min="0" step="1" value=${weight} onInput=${(e) => set(index, 1, e.currentTarget.value)} /></div>
      ${form.targets.length > 1 && html`<button type="button" class="icon" aria-label=${`Remove target ${index + 1}`} onClick=${() => setForm({ ...form, targets: form.targets.toSpliced(index, 1) })}>✕</button>`}</fieldset>`)}
    <datalist id="targets">${known && [...known.adapters, ...known.aliases].map((card) => html`<option key=${card.id} value=${card.id}></option>`)}</datalist>
    <div class="buttons"><button type="submit" class="primary">Save</button>
      <button type="button" onClick=${() => setForm({ ...form, targets: [...form.targets, ["", 1]] })}>Add a target</button>
      ${form.revision > 0 && html`<button type="button" onClick=${() => setForm(NEW)}>Cancel</button>`}</div></form>`;
}
