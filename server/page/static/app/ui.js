// The one place that names the view library: `html` makes elements from tagged text, hooks keep state.
import { h, render, Fragment } from "../vendor/preact.mjs";
import { useEffect, useLayoutEffect, useMemo, useRef, useState, useCallback } from "../vendor/hooks.mjs";
import htm from "../vendor/htm.mjs";

export const html = htm.bind(h);
export { render, Fragment, useEffect, useLayoutEffect, useMemo, useRef, useState, useCallback };

// A value that several views read. `useValue(cell)` draws a view again whenever the value changes.
export function cell(value) {
  const readers = new Set();
  return {
    get: () => value,
    set(next) {
      if (next === value) return;
      value = next;
      for (const reader of [...readers]) reader();
    },
    watch(reader) {
      readers.add(reader);
      return () => readers.delete(reader);
    },
  };
}

export function useValue(source) {
  const [, redraw] = useState(0);
  const drawn = source.get();
  useEffect(() => {
    const again = () => redraw((n) => n + 1);
    if (source.get() !== drawn) again(); // it changed between drawing and watching
    return source.watch(again);
  }, [source]);
  return drawn;
}

// Runs `work` at once and every `milliseconds`, but only while the page is visible.
export function useEvery(milliseconds, work, inputs = []) {
  useEffect(() => {
    const visible = () => document.visibilityState === "visible";
    const run = () => visible() && work();
    run();
    const timer = setInterval(run, milliseconds);
    document.addEventListener("visibilitychange", run);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", run);
    };
  }, inputs);
}

// A modal dialog. Escape closes it, and then the element before gets the focus back.
export function Dialog({ title, onClose, children, wide = false }) {
  const ref = useRef();
  useEffect(() => {
    const before = document.activeElement;
    ref.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  return html`<dialog ref=${ref} class=${wide ? "wide" : ""} aria-labelledby="dialog-title" onClose=${onClose}>
    <header><h2 id="dialog-title">${title}</h2>
      <button type="button" class="icon" aria-label="Close" onClick=${() => ref.current.close()}>✕</button></header>
    ${children}
  </dialog>`;
}

// Asks before something that cannot be taken back. Calls `onYes` once.
export function Confirm({ title, text, yes, onYes, onClose }) {
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <p>${text}</p>
    <div class="buttons">
      <button type="button" class="danger" onClick=${() => { onYes(); onClose(); }}>${yes}</button>
      <button type="button" onClick=${onClose}>Cancel</button>
    </div>
  <//>`;
}
