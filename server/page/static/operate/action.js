// The state of a button or form that changes something on the server: busy, done, or refused with the server's message.
import { announce } from "../app/announce.js";
import { html, useState } from "../app/ui.js";

// Returns [run, state]. `run(work, done)` awaits `work()` and sets the state to its failure, or to the words of
// `done(answer)`. It resolves to whether the work succeeded.
export function useAction() {
  const [state, setState] = useState({ isBusy: false, failure: null, done: "" });
  const run = async (work, done) => {
    setState({ isBusy: true, failure: null, done: "" });
    try {
      const words = done(await work());
      setState({ isBusy: false, failure: null, done: words });
      announce(words);
      return true;
    } catch (failure) {
      setState({ isBusy: false, failure, done: "" });
      announce(`Refused. ${failure.message}`);
      return false;
    }
  };
  return [run, state];
}

export function Outcome({ state }) {
  if (state.isBusy) return html`<p class="hint">Working …</p>`;
  if (state.failure) {
    return html`<div class="failure"><p><strong>${state.failure.message}</strong></p>
      <p class="small">${[state.failure.status && `status ${state.failure.status}`, state.failure.code].filter(Boolean).join(" · ")}</p></div>`;
  }
  return state.done ? html`<p class="note">${state.done}</p>` : null;
}
