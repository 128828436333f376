// The conversations of this browser: search, open, delete, export, import.
import { deleteConversations, exportAll, importFile, list, rename, storageProblem } from "./conversations.js";
import { day } from "../app/format.js";
import { Confirm, Dialog, html, useMemo, useRef, useState, useValue } from "../app/ui.js";

const SHOWN_AT_FIRST = 60;

export function Sidebar({ shownId, onClose }) {
  const entries = useValue(list);
  const problem = useValue(storageProblem);
  const [search, setSearch] = useState("");
  const [asking, setAsking] = useState(null);
  const [note, setNote] = useState("");
  const [most, setMost] = useState(SHOWN_AT_FIRST);
  const file = useRef();
  const found = useMemo(() => {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    return entries.filter(({ title, model }) => words.every((word) => `${title} ${model}`.toLowerCase().includes(word)));
  }, [entries, search]);
  const take = async (event) => {
    const chosen = event.currentTarget.files[0];
    if (chosen) setNote(await importFile(chosen));
    file.current.value = "";
  };
  return html`<section class="sidebar" id="conversations" aria-label="Conversations">
    <div class="buttons"><a class="button primary" href="#/chat" onClick=${onClose}>New conversation</a></div>
    <label class="unseen" for="search">Search conversations</label>
    <input id="search" type="search" placeholder="Search" value=${search} onInput=${(e) => setSearch(e.currentTarget.value)} />
    ${(problem || note) && html`<p class="note" role="status">${problem || note}</p>`}
    <ul class="conversations">
      ${found.slice(0, most).map((entry) => html`<${Entry} key=${entry.id} entry=${entry} isShown=${entry.id === shownId} onAsk=${setAsking} />`)}
    </ul>
    ${found.length > most && html`<button type="button" onClick=${() => setMost(most + 200)}>Show ${found.length - most} more</button>`}
    ${entries.length === 0 && html`<p class="hint">Conversations are kept in this browser, not on the server.</p>`}
    <div class="buttons files">
      <button type="button" disabled=${entries.length === 0} onClick=${async () => setNote(`Exported ${await exportAll()} conversations.`)}>Export</button>
      <button type="button" onClick=${() => file.current.click()}>Import</button>
      <button type="button" disabled=${entries.length === 0} onClick=${() => setAsking({ kind: "all" })}>Delete all</button>
      <input ref=${file} id="import-file" class="unseen" tabindex="-1" type="file" accept="application/json,.json" aria-label="File to import" onChange=${take} />
    </div>
    ${asking && html`<${Question} asking=${asking} entries=${entries} onClose=${() => setAsking(null)} />`}
  </section>`;
}

function Entry({ entry, isShown, onAsk }) {
  const title = entry.title || "Untitled";
  return html`<li class=${isShown ? "shown" : ""}>
    <a href=${`#/${entry.kind}/${entry.id}`} aria-current=${isShown ? "true" : null}>
      <span>${title}</span><small>${entry.kind === "mix" ? "mixture" : entry.model} · ${day(entry.updated)}</small></a>
    <button type="button" class="icon" aria-label=${`Rename ${title}`} onClick=${() => onAsk({ kind: "rename", entry })}>✎</button>
    <button type="button" class="icon" aria-label=${`Delete ${title}`} onClick=${() => onAsk({ kind: "delete", entry })}>✕</button>
  </li>`;
}

function Question({ asking, entries, onClose }) {
  const [title, setTitle] = useState(asking.entry?.title ?? "");
  if (asking.kind === "rename") {
    return html`<${Dialog} title="Rename the conversation" onClose=${onClose}>
      <form class="stack" onSubmit=${(event) => { event.preventDefault(); rename(asking.entry.id, title); onClose(); }}>
        <label for="new-title">Title</label>
        <input id="new-title" autofocus value=${title} maxlength="200" onInput=${(e) => setTitle(e.currentTarget.value)} />
        <div class="buttons"><button class="primary" type="submit">Rename</button></div></form><//>`;
  }
  const isAll = asking.kind === "all";
  const ids = isAll ? entries.map(({ id }) => id) : [asking.entry.id];
  return html`<${Confirm} title=${isAll ? "Delete all conversations?" : "Delete this conversation?"}
    text=${isAll ? `All ${ids.length} conversations in this browser will be gone. Export them first to keep them.` : `“${asking.entry.title}” will be gone.`}
    yes="Delete" onYes=${() => deleteConversations(ids)} onClose=${onClose} />`;
}
