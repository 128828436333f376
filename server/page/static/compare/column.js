// One model's answer, and all answers of a round side by side.
import { marked } from "./diff.js";
import { Failure } from "../app/failure.js";
import { shortVersion } from "../app/format.js";
import { html, useMemo } from "../app/ui.js";
import { Numbers, Rendered } from "../chat/message.js";

export function Columns({ shown, showsDifferences }) {
  const first = shown.answers[0].answer;
  return html`<div class="columns">${shown.answers.map(({ model, answer }, index) => html`
    <${Column} key=${index} title=${model} answer=${answer}
      other=${showsDifferences && index > 0 && !shown.isBusy ? first.text : null} />`)}</div>`;
}

export function Column({ title, answer, other = null, isNamed = true }) {
  const words = useMemo(() => (other === null ? null : marked(answer.text, other)), [answer.text, other]);
  const isBusy = ["waiting", "streaming"].includes(answer.state);
  return html`<article class="column" aria-label=${`Answer of ${title}`} aria-busy=${isBusy}>
    <header><strong>${title}</strong>${isNamed && answer.versions && html` <span class="version">${shortVersion(answer.versions)}</span>`}</header>
    ${words ? html`<p class="text plain">${words.map(({ word, isNew }, i) => (isNew ? html`<mark key=${i}>${word}</mark>` : word))}</p>`
      : html`<${Rendered} text=${answer.text} isGrowing=${isBusy} />`}
    ${answer.state === "waiting" && html`<p class="waiting">Waiting<span class="dots"></span></p>`}
    ${answer.error && html`<${Failure} error=${answer.error} />`}
    ${isNamed && html`<${Numbers} node=${answer} />`}
  </article>`;
}
