// One message: its text, its author and speed, and buttons to edit, copy and retry.
import { announce } from "../app/announce.js";
import { changed, edit, liveCell, retry } from "./conversations.js";
import { asSum, count, seconds, shortVersion } from "../app/format.js";
import { blockRenderer, toHtml } from "../app/markdown.js";
import { chooseSibling, siblings } from "./tree.js";
import { html, useEffect, useMemo, useRef, useState, useValue } from "../app/ui.js";
import { Failure } from "../app/failure.js";
import { Tokens } from "./tokens.js";

export function Message({ conversation, node }) {
  return node.role === "user"
    ? html`<${Question} conversation=${conversation} node=${node} />`
    : html`<${Answer} conversation=${conversation} node=${node} />`;
}

function Question({ conversation, node }) {
  const [isEditing, setEditing] = useState(false);
  const [text, setText] = useState(node.text);
  const submit = (event) => {
    event.preventDefault();
    if (!text.trim()) return;
    setEditing(false);
    edit(conversation, node, text);
  };
  if (isEditing) {
    return html`<article class="message user" aria-label="You">
      <form onSubmit=${submit} class="edit">
        <label class="unseen" for=${`edit-${node.id}`}>Change your message</label>
        <textarea id=${`edit-${node.id}`} value=${text} autofocus rows="3" onInput=${(e) => setText(e.currentTarget.value)}
          ref=${(box) => box?.focus()} onKeyDown=${(e) => {
            if (e.key === "Enter" && !e.shiftKey && !e.isComposing) submit(e);
            if (e.key === "Escape") { e.stopPropagation(); setEditing(false); }
          }} />
        <div class="buttons"><button type="submit" class="primary">Send as a new branch</button>
          <button type="button" onClick=${() => setEditing(false)}>Cancel</button></div>
      </form></article>`;
  }
  return html`<article class="message user" aria-label="You">
    <div class="bubble">${node.text}</div>
    <footer><${Branches} conversation=${conversation} node=${node} />
      <button type="button" class="quiet" onClick=${() => { setText(node.text); setEditing(true); }}>Edit</button>
      <${Copy} text=${node.text} /></footer>
  </article>`;
}

function Answer({ conversation, node }) {
  useValue(liveCell(node.id));
  const [showsTokens, setShowsTokens] = useState(false);
  const isBusy = node.state === "waiting" || node.state === "streaming";
  const who = nameOf(node);
  return html`<article class="message answer" aria-label=${`Answer of ${who}`} aria-busy=${isBusy}>
    <header><strong>${who}</strong>${node.versions && html` <span class="version" title=${`version ${node.versions}`}>${shortVersion(node.versions)}</span>`}</header>
    ${showsTokens ? html`<${Tokens} tokens=${node.tokens} />` : html`<${Rendered} text=${node.text} isGrowing=${isBusy} />`}
    ${node.state === "waiting" && html`<p class="waiting">Waiting for the first token<span class="dots"></span></p>`}
    ${node.error && html`<${Failure} error=${node.error} onRetry=${() => retry(conversation, node)} />`}
    <${Numbers} node=${node} />
    ${!isBusy && html`<footer><${Branches} conversation=${conversation} node=${node} />
      ${!node.error && html`<button type="button" class="quiet" onClick=${() => retry(conversation, node)}>Retry</button>`}
      ${node.text && html`<${Copy} text=${node.text} />`}
      ${node.tokens?.length > 0 && html`<button type="button" class="quiet" aria-pressed=${showsTokens}
        onClick=${() => setShowsTokens(!showsTokens)}>Probabilities</button>`}
    </footer>`}
  </article>`;
}

export function nameOf({ model, mixed }) {
  if (!mixed?.length) return model;
  return asSum(mixed.map(({ name, scale }) => [name, scale]));
}

// Markdown. While the answer grows, only its last block is rendered again. At the end all is, for links whose target comes later.
export function Rendered({ text, isGrowing = false }) {
  const growing = useMemo(() => blockRenderer(), []);
  const blocks = useMemo(() => (isGrowing ? growing(text) : [toHtml(text)]), [text, isGrowing]);
  return html`<div class="text">${blocks.map((inner, index) => html`<${Block} key=${index} inner=${inner} />`)}</div>`;
}

function Block({ inner }) {
  return useMemo(() => html`<div class="block" dangerouslySetInnerHTML=${{ __html: inner }} />`, [inner]);
}

const ENDS = { length: "cut at its limit of tokens", stop: null, tool_calls: "tool calls" };

export function Numbers({ node }) {
  const parts = [];
  if (node.state === "stopped") parts.push("stopped");
  if (node.finish && ENDS[node.finish]) parts.push(ENDS[node.finish]);
  if (node.usage) parts.push(`${count(node.usage.completion_tokens)} tokens`);
  if (node.firstTokenMs !== null && node.firstTokenMs !== undefined) parts.push(`first token after ${seconds(node.firstTokenMs / 1000)}`);
  if (node.tokensPerSecond) parts.push(`${node.tokensPerSecond.toFixed(1)} tokens/s`);
  return parts.length > 0 && html`<p class="numbers">${parts.join(" · ")}</p>`;
}

function Branches({ conversation, node }) {
  const { number, total } = siblings(conversation, node);
  if (total < 2) return null;
  const go = (step) => {
    chooseSibling(conversation, node, step);
    changed(conversation);
    announce(`Branch ${number + step} of ${total}`);
  };
  return html`<span class="branches" role="group" aria-label="Branches">
    <button type="button" class="quiet" aria-label="Branch before" disabled=${number === 1} onClick=${() => go(-1)}>‹</button>
    <span>${number} / ${total}</span>
    <button type="button" class="quiet" aria-label="Branch after" disabled=${number === total} onClick=${() => go(1)}>›</button></span>`;
}

function Copy({ text }) {
  const [isDone, setDone] = useState(false);
  const timer = useRef();
  useEffect(() => () => clearTimeout(timer.current), []);
  const copy = async () => {
    if (!(await copied(text))) return;
    setDone(true);
    timer.current = setTimeout(() => setDone(false), 1500);
  };
  return html`<button type="button" class="quiet" onClick=${copy}>${isDone ? "Copied" : "Copy"}</button>`;
}

// Copies a text. Browsers have navigator.clipboard on https and localhost only, so there is a second way.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(box);
    box.select();
    const worked = document.execCommand("copy");
    box.remove();
    return worked;
  }
}
