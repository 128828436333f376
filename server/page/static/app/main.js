// Starts the page: draws the frame, and the view that the address names.
import { LiveRegion } from "./announce.js";
import { checkHealth, serverState } from "./api.js";
import { KeyDialog, KeyButton } from "./keys.js";
import { refreshModels } from "./models.js";
import { html, render, useEffect, useEvery, useRef, useState, useValue } from "./ui.js";
import { Chat } from "../chat/chat.js";
import { Compare } from "../compare/compare.js";
import { Mix } from "../chat/mix.js";
import { Operate } from "../operate/operate.js";
import { refreshList } from "../chat/conversations.js";

const VIEWS = [
  { name: "chat", label: "Chat", view: Chat },
  { name: "compare", label: "Compare", view: Compare },
  { name: "mix", label: "Mix", view: Mix },
  { name: "operate", label: "Operate", view: Operate },
];
const WORDS = {
  loading: "The server is starting: it loads its model. The page asks again every few seconds.",
  draining: "The server is about to stop: running answers may finish, new requests will be refused.",
  unavailable: "The server does not take requests at the moment.",
  unreachable: "The server can't be reached. The page asks again every few seconds.",
};

function place() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  const found = VIEWS.find((view) => view.name === name) ?? VIEWS[0];
  return { ...found, hash: location.hash || `#/${found.name}`, rest: rest.map(decodeURIComponent) };
}

function usePlace() {
  const [here, setHere] = useState(place());
  useEffect(() => {
    const follow = () => setHere(place());
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  return here;
}

function Health() {
  const state = useValue(serverState);
  const before = useRef(state);
  const [isBack, setBack] = useState(false);
  useEvery(state === "ready" ? 15000 : 3000, checkHealth, [state]);
  useEffect(() => {
    if (state === "ready" && before.current !== "ready") {
      setBack(true);
      refreshModels();
      setTimeout(() => setBack(false), 6000);
    }
    before.current = state;
  }, [state]);
  if (state === "ready") return isBack ? html`<p class="banner good" role="status">The server is back.</p>` : null;
  return html`<p class="banner" role="alert">${WORDS[state]}</p>`;
}

function App() {
  const here = usePlace();
  const last = useRef({}); // view's name → the last address in it, for its link
  last.current[here.name] = here.hash;
  const View = here.view;
  useEvery(30000, refreshModels);
  useEffect(() => {
    refreshList();
  }, []);
  useEffect(() => {
    document.title = `${here.label} · Guanaco`;
  }, [here.name]);
  return html`
    <a class="skip" href="#main" onClick=${skipToMain}>Skip to the content</a>
    <header class="top">
      <p class="brand"><img src="page/icon.svg" alt="" width="26" height="26" /> <span>Guanaco</span></p>
      <nav aria-label="Views">
        ${VIEWS.map(({ name, label }) => html`<a key=${name} href=${last.current[name] ?? `#/${name}`}
          aria-current=${name === here.name ? "page" : null}>${label}</a>`)}
      </nav>
      <${KeyButton} />
    </header>
    <${Health} />
    <main id="main" tabindex="-1"><${View} rest=${here.rest} /></main>
    <${LiveRegion} />
    <${KeyDialog} />`;
}

function skipToMain(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
