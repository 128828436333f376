// Compare: one prompt to two to four names at once, side by side or blind.
import { LEAST, MOST, round, startRound, stopRound } from "./columns.js";
import { models } from "../app/models.js";
import { FIELDS } from "../app/sampling.js";
import { cell, html, useEffect, useState, useValue } from "../app/ui.js";
import { Ballot, Results } from "./ballot.js";
import { Columns } from "./column.js";
import { Picker } from "../app/picker.js";
import { NumberField } from "../chat/settings.js";

// Outside the view, so that they are kept while the reader looks at another one.
const setup = cell({ names: null, isBlind: false, showsDifferences: true, system: "", sampling: { seed: 1, max_tokens: 256 } });
const drafts = cell("");

export function Compare() {
  const known = useValue(models);
  const chosen = useValue(setup);
  const shown = useValue(round);
  const prompts = useValue(drafts);
  const [queue, setQueue] = useState([]);
  const change = (fields) => setup.set({ ...setup.get(), ...fields });
  useEffect(() => {
    if (known && !chosen.names) change({ names: firstNames(known) });
  }, [known, chosen.names]);
  const names = chosen.names ?? [];
  const isBusy = shown?.isBusy ?? false;
  const isSame = chosen.isBlind && new Set(names).size < names.length;

  const ask = (prompt) => {
    const asked = chosen.isBlind ? drawPair(names) : names;
    round.set(null);
    startRound(asked, prompt, chosen).then(() => {});
  };
  const submit = (event) => {
    event.preventDefault();
    if (isBusy || !names.length || isSame) return;
    // Blind: every line is a prompt of its own, asked one after the other as votes come.
    const lines = chosen.isBlind ? prompts.split("\n").map((line) => line.trim()).filter(Boolean) : [prompts.trim()];
    if (!lines[0]) return;
    setQueue(lines.slice(1));
    ask(lines[0]);
  };
  const next = () => {
    if (!queue.length) return;
    setQueue(queue.slice(1));
    ask(queue[0]);
  };
  return html`<div class="page compare">
    <h1 class="unseen">Compare</h1>
    <form class="panel stack" onSubmit=${submit}>
      <${Names} names=${names} onChange=${(list) => change({ names: list })} disabled=${isBusy} />
      <label for="prompt">${chosen.isBlind ? "Prompts, one a line" : "Prompt"}</label>
      <textarea id="prompt" rows="2" value=${prompts} placeholder="How do I boil an egg?" onInput=${(e) => drafts.set(e.currentTarget.value)}
        onKeyDown=${(e) => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing && !chosen.isBlind) submit(e); }} />
      <${Options} chosen=${chosen} change=${change} isBusy=${isBusy} />
      <div class="buttons">
        ${isBusy ? html`<button type="button" class="primary" onClick=${stopRound}>Stop</button>`
          : html`<button type="submit" class="primary" disabled=${!prompts.trim() || !names.length || isSame}>${chosen.isBlind ? "Ask blind" : "Ask all"}</button>`}
        ${isSame && html`<span class="hint">A blind comparison needs columns with different names.</span>`}
        ${queue.length > 0 && html`<span class="hint">${queue.length} more prompts wait</span>`}
      </div>
    </form>
    ${!shown && html`<${Explanation} isBlind=${chosen.isBlind} />`}
    ${shown && (chosen.isBlind ? html`<${Ballot} key=${shown.id} shown=${shown} hasNext=${queue.length > 0} onNext=${next} onAgain=${() => ask(shown.prompt)} />`
      : html`<${Columns} shown=${shown} showsDifferences=${chosen.showsDifferences} />`)}
    <${Results} />
  </div>`;
}

function Explanation({ isBlind }) {
  return html`<div class="empty"><h2>${isBlind ? "Which answer is better?" : "One prompt, several answers"}</h2>
    <p class="hint">${isBlind
      ? "For each prompt two of the columns answer, without names. Vote with the keys 1, 2 and 3; the votes below are counted with an interval."
      : "All columns answer the same prompt at the same time, with the same seed, so that differences come from the adapters."}</p></div>`;
}

function Names({ names, onChange, disabled }) {
  const known = useValue(models);
  const all = known ? [...known.base, ...known.adapters, ...known.aliases].map((card) => card.id) : [];
  return html`<fieldset class="names"><legend>Who answers</legend>
    ${names.map((name, index) => html`<span key=${index} class="name">
      <${Picker} id=${`column-${index}`} label=${`Column ${index + 1}`} value=${name} disabled=${disabled}
        onChange=${(value) => onChange(names.with(index, value))} />
      ${names.length > LEAST && html`<button type="button" class="icon" disabled=${disabled} aria-label=${`Remove column ${index + 1}`}
        onClick=${() => onChange(names.toSpliced(index, 1))}>✕</button>`}</span>`)}
    ${names.length < MOST && html`<button type="button" disabled=${disabled || !all.length}
      onClick=${() => onChange([...names, all.find((name) => !names.includes(name)) ?? all[0]])}>Add a column</button>`}
  </fieldset>`;
}

function Options({ chosen, change, isBusy }) {
  const set = (name, value) => {
    const sampling = { ...chosen.sampling, [name]: value };
    if (value === undefined) delete sampling[name];
    change({ sampling });
  };
  const check = (name, label) => html`<label class="check"><input type="checkbox" checked=${chosen[name]} disabled=${isBusy}
    onChange=${(e) => change({ [name]: e.currentTarget.checked })} />${label}</label>`;
  const shown = FIELDS.filter(({ name }) => ["seed", "temperature", "max_tokens"].includes(name));
  return html`<div class="options">
    ${check("isBlind", "Blind: names are hidden until you vote")}
    ${!chosen.isBlind && check("showsDifferences", "Mark words that the first column doesn't have")}
    <details><summary>Same seed, temperature and length for all</summary>
      <div class="fields">${shown.map((field) => html`<${NumberField} key=${field.name} prefix="compare" field=${field}
        value=${chosen.sampling[field.name]} onChange=${(value) => set(field.name, value)} />`)}
        <div><label for="compare-system">System prompt</label><textarea id="compare-system" rows="1" value=${chosen.system}
          onInput=${(e) => change({ system: e.currentTarget.value })} /></div></div>
    </details></div>`;
}

function firstNames({ base, adapters, aliases }) {
  const all = [...adapters, ...base, ...aliases].map((card) => card.id);
  return all.length > 1 ? all.slice(0, Math.min(3, all.length)) : [all[0], all[0]];
}

// Two of the columns, in random order, so that the side does not tell the name.
function drawPair(names) {
  const left = Math.floor(Math.random() * names.length);
  const right = (left + 1 + Math.floor(Math.random() * (names.length - 1))) % names.length;
  return [names[left], names[right]];
}
