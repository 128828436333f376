// The box in which the reader writes. Enter sends, Shift+Enter begins a new line, Escape stops the answer.
import { runningIn, say, stop } from "./conversations.js";
import { html, useEffect, useRef, useState } from "../app/ui.js";

export function Composer({ conversation, disabled = false, hint = "" }) {
  const [text, setText] = useState("");
  const box = useRef();
  const busy = runningIn(conversation);
  useEffect(() => {
    if (matchMedia("(hover: hover)").matches) box.current.focus(); // on a phone the keyboard would cover the page
    setText("");
  }, [conversation.id]);
  useEffect(() => {
    const onKey = (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop(conversation);
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, [conversation]);

  const submit = () => {
    if (!text.trim() || busy.length || disabled) return;
    setText("");
    say(conversation, text);
    location.hash = `#/${conversation.kind}/${conversation.id}`;
    box.current.focus();
  };
  const onKeyDown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  };
  return html`<form class="composer" onSubmit=${(event) => { event.preventDefault(); submit(); }}>
    <label class="unseen" for="message">Your message</label>
    <textarea id="message" ref=${box} rows="1" value=${text} placeholder="Write a message"
      aria-describedby="composer-hint" onInput=${(e) => setText(e.currentTarget.value)} onKeyDown=${onKeyDown} />
    ${busy.length
      ? html`<button type="button" class="primary stop" onClick=${() => { stop(conversation); box.current.focus(); }}>Stop</button>`
      : html`<button type="submit" class="primary" disabled=${!text.trim() || disabled}>Send</button>`}
    <p id="composer-hint" class="hint">${hint || "Enter sends, Shift+Enter begins a new line, Escape stops."}</p>
  </form>`;
}
