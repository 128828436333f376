// The messages of a conversation, and how much of the context they take.
import { runningIn } from "./conversations.js";
import { count } from "../app/format.js";
import { cardOf, baseName } from "../app/models.js";
import { shownPath } from "./tree.js";
import { html, useEffect, useRef, useState } from "../app/ui.js";
import { Message } from "./message.js";

const NEAR_THE_END = 80; // pixels: closer than this, the view follows a growing answer

export function Thread({ conversation, empty }) {
  const box = useRef();
  const inner = useRef();
  const follows = useRef(true);
  const [isAway, setAway] = useState(false);
  const path = shownPath(conversation);
  useEffect(() => {
    const toEnd = () => {
      if (follows.current && box.current) box.current.scrollTop = box.current.scrollHeight;
    };
    const observer = new ResizeObserver(toEnd);
    observer.observe(inner.current);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    follow();
  }, [conversation.id, runningIn(conversation).length > 0]);
  const onScroll = () => {
    if (!box.current) return; // the view was removed before this event
    const { scrollHeight, scrollTop, clientHeight } = box.current;
    follows.current = scrollHeight - scrollTop - clientHeight < NEAR_THE_END;
    setAway(!follows.current);
  };
  function follow() {
    follows.current = true;
    if (box.current) box.current.scrollTop = box.current.scrollHeight;
  }
  return html`<div class="thread" ref=${box} onScroll=${onScroll} role="log" aria-live="off" aria-label="Messages" tabindex="0">
    <div class="messages" ref=${inner}>
      ${path.length === 0 ? empty : path.map((node) => html`<${Message} key=${node.id} conversation=${conversation} node=${node} />`)}
    </div>
    ${isAway && html`<button type="button" class="to-end" onClick=${follow}>↓ To the end</button>`}
  </div>`;
}

export function ContextMeter({ conversation }) {
  const most = cardOf(conversation.model || baseName())?.max_model_len;
  const last = shownPath(conversation).findLast((node) => node.usage);
  if (!most || !last) return null;
  const used = last.usage.prompt_tokens + last.usage.completion_tokens;
  return html`<span class="context" title="Tokens of the context that this conversation takes">
    <meter min="0" max=${most} high=${most * 0.85} value=${used} aria-label="Context used"></meter>
    <span>${count(used)} of ${count(most)} tokens</span></span>`;
}
