// An answer token by token, shaded by probability. Pointing at a token, or walking to it with the arrow keys, shows what else
// could have come.
import { percent } from "../app/format.js";
import { html, useRef, useState } from "../app/ui.js";

export function Tokens({ tokens }) {
  const [at, setAt] = useState(0);
  const box = useRef();
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length }[event.key];
    if (!step) return;
    event.preventDefault();
    setAt(Math.min(tokens.length - 1, Math.max(0, at + step)));
  };
  const token = tokens[at];
  return html`<div class="tokens">
    <p class="sequence" ref=${box} tabindex="0" role="group" aria-label="Tokens; the arrow keys walk through them"
      aria-describedby="token-detail" onKeyDown=${move}
      onPointerOver=${(event) => event.target.dataset.index && setAt(Number(event.target.dataset.index))}>
      ${tokens.map((item, index) => html`<span key=${index} data-index=${index}
        class=${`p${level(item.p)} ${index === at ? "here" : ""}`}>${item.text}</span>`)}
    </p>
    ${token && html`<table id="token-detail" aria-live="polite"><caption>Token ${at + 1}: <code>${visible(token.text)}</code> had ${percent(token.p, 1)}</caption>
      <tbody>${token.top.map((other, index) => html`<tr key=${index} class=${other.text === token.text ? "chosen" : ""}>
        <th scope="row"><code>${visible(other.text)}</code></th><td>${percent(other.p, 1)}</td>
        <td><meter min="0" max="1" value=${other.p} aria-hidden="true"></meter></td></tr>`)}</tbody></table>`}
  </div>`;
}

const level = (p) => (p > 0.9 ? 0 : p > 0.6 ? 1 : p > 0.3 ? 2 : p > 0.1 ? 3 : 4);

const visible = (text) => JSON.stringify(text).slice(1, -1).replace(/^ | $/g, "␣") || "␣";
