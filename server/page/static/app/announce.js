// The texts that screen readers read out: whole sentences of an answer, and events. Never single tokens.
import { html, cell, useValue } from "./ui.js";

const KEPT = 6;
const said = cell([]);
let number = 0;

export function announce(text) {
  const plain = text.replace(/[*_`#>|~]+/g, "").trim();
  if (plain) said.set([...said.get(), { number: (number += 1), plain }].slice(-KEPT));
}

// Returns a function (text, isComplete) for a growing text. It announces each sentence once, when it is complete.
export function sentenceAnnouncer() {
  let told = 0;
  return (text, isComplete) => {
    let end = isComplete ? text.length : told;
    if (!isComplete) {
      for (const match of text.slice(told).matchAll(/[.!?:][)"'\]]?\s|\n\n/g)) end = told + match.index + match[0].length;
    }
    if (end > told) announce(text.slice(told, end));
    told = Math.max(told, end);
  };
}

export function LiveRegion() {
  const lines = useValue(said);
  return html`<div class="unseen" role="status" aria-live="polite" aria-relevant="additions" id="announcements">
    ${lines.map((line) => html`<p key=${line.number}>${line.plain}</p>`)}
  </div>`;
}
