// The adapters as the admin key sees them: state, tier, size, effect, history; load, replace, pin, roll back, remove.
import { adapters, checkAdapter, loadAdapter, pinAdapter, removeAdapter, rollbackAdapter } from "./admin.js";
import { ago, bytes, count } from "../app/format.js";
import { Confirm, html, useState, useValue } from "../app/ui.js";
import { Outcome, useAction } from "./action.js";

export function Adapters() {
  const cards = useValue(adapters) ?? [];
  const [run, state] = useAction();
  const [asking, setAsking] = useState(null);
  const [form, setForm] = useState({ name: "", source: "", profile: "" });
  return html`<section class="panel" aria-labelledby="adapters"><h2 id="adapters">Adapters</h2>
    ${cards.length === 0 ? html`<p class="hint">No adapter is loaded: the base alone answers. Load one below.</p>` : html`<div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table>
      <thead><tr><th>Name</th><th>State</th><th>Where</th><th class="number">Rank</th><th class="number">Size</th><th class="number" title="largest change of a logit on the probe prompt">Effect</th>
        <th class="number" title="requests that use it now">In use</th><th>Version</th><th>Used</th><th>Actions</th></tr></thead>
      <tbody>${cards.map((card) => html`<${Row} key=${card.name} card=${card} run=${run} ask=${setAsking} replace=${() => {
        setForm({ name: card.name, source: "", profile: "" });
        document.getElementById("load-source").focus();
      }} />`)}</tbody></table></div>`}
    <${LoadForm} form=${form} setForm=${setForm} run=${run} cards=${cards} />
    <${Outcome} state=${state} />
    ${asking && html`<${Confirm} title=${`Remove ${asking}?`} text="Requests by this name are refused from then on. Running ones get ten seconds to finish."
      yes="Remove" onClose=${() => setAsking(null)} onYes=${() => run(() => removeAdapter(asking, false),
        (answer) => `${asking} is removed.${answer.drained ? "" : " Some of its requests still run."}`)} />`}
  </section>`;
}

function Row({ card, run, ask, replace }) {
  const [version, setVersion] = useState("");
  const { name } = card;
  const earlier = (card.history ?? []).filter((entry) => entry !== card.version).toReversed();
  const act = (label, text, work) => html`<button type="button" class="quiet" aria-label=${`${label} ${name}`} onClick=${work}>${text}</button>`;
  return html`<tr><th scope="row">${name}${card.aliases.length > 0 && html`<br /><small>alias ${card.aliases.join(", ")}</small>`}</th>
    <td class=${card.state === "broken" ? "bad" : ""}>${card.loading ? "loading" : card.state}
      ${card.error && html`<br /><small>${card.error.message}</small>`}
      ${card.notes?.map((note, i) => html`<br key=${`b${i}`} /><small key=${i}>${note}</small>`)}</td>
    <td>${card.tier ?? "–"}${card.pinned ? ", pinned" : ""}</td><td class="number">${card.rank ?? "–"}</td><td class="number">${bytes(card.num_bytes)}</td>
    <td class="number" title="largest change of a logit on the probe prompt">${card.effect === undefined || card.effect === null ? "–" : card.effect.toFixed(2)}</td>
    <td class="number">${count(card.pins)}</td><td><code title=${card.version}>${(card.version ?? "").slice(0, 8)}</code><br /><small>${card.source}</small></td>
    <td>${count(card.num_uses)} times<br /><small>${ago(card.last_used)}</small></td>
    <td class="actions">
      ${act("Replace", "Replace", replace)}
      ${act(card.pinned ? "Unpin" : "Pin", card.pinned ? "Unpin" : "Pin", () => run(() => pinAdapter(name, !card.pinned),
        (answer) => `${name} is ${answer.pinned ? "pinned" : "no longer pinned"}.`))}
      ${earlier.length > 0 && html`<span class="rollback"><select aria-label=${`Version of ${name} to go back to`} value=${version} onChange=${(e) => setVersion(e.currentTarget.value)}>
          <option value="">the one before</option>${earlier.map((entry) => html`<option key=${entry} value=${entry}>${entry.slice(0, 12)}</option>`)}</select>
        ${act("Roll back", "Roll back", () => run(() => rollbackAdapter(name, version), (answer) => `${name} is at version ${answer.version.slice(0, 8)} again.`))}</span>`}
      ${act("Remove", "Remove", () => ask(name))}</td></tr>`;
}

function LoadForm({ form, setForm, run, cards }) {
  const set = (field) => (event) => setForm({ ...form, [field]: event.currentTarget.value });
  const isThere = cards.some((card) => card.name === form.name.trim());
  const [name, source] = [form.name.trim(), form.source.trim()];
  const load = async (event) => {
    event.preventDefault();
    const worked = await run(() => loadAdapter(name, source, form.profile), (card) => `${name} is served: version ${card.version.slice(0, 8)}, rank ${card.rank}.`);
    if (worked) setForm({ name: "", source: "", profile: "" });
  };
  const check = () => run(() => checkAdapter(name, source), (report) =>
    `It would load: rank ${report.rank}, ${bytes(report.num_bytes)}, version ${String(report.version).slice(0, 8)}.`);
  return html`<form class="inline" onSubmit=${load}><h3>Load or replace</h3>
    <div><label for="load-name">Name</label><input id="load-name" required maxlength="64" value=${form.name} onInput=${set("name")} /></div>
    <div class="grow"><label for="load-source">Folder below --adapter-root, or ORG/NAME@REVISION</label>
      <input id="load-source" required maxlength="1024" value=${form.source} onInput=${set("source")} /></div>
    <div><label for="load-profile">Profile</label><select id="load-profile" value=${form.profile} onChange=${set("profile")}>
      <option value="">the adapter's own</option><option value="guanaco">guanaco</option></select></div>
    <div class="buttons"><button type="submit" class="primary">${isThere ? "Replace" : "Load"}</button>
      <button type="button" disabled=${!name || !source} onClick=${check}>Check only</button></div></form>`;
}
