// Asks for the API key and the admin key, and says where they are kept.
import { refreshModels } from "./models.js";
import { adminKey, apiKey, keyWanted } from "./session.js";
import { Dialog, html, useState, useValue } from "./ui.js";

const REASONS = {
  api: "This server asks for an API key, or does not know the one that was sent.",
  admin: "This needs the server's admin key (--admin-key), or the one that was sent is not right.",
};

export function KeyButton() {
  const has = useValue(apiKey) || useValue(adminKey);
  return html`<button type="button" class="quiet keys" onClick=${() => keyWanted.set("settings")}>
    ${has ? "Keys ✓" : "Keys"}</button>`;
}

export function KeyDialog() {
  const wanted = useValue(keyWanted);
  return wanted && html`<${KeyForm} wanted=${wanted} />`;
}

function KeyForm({ wanted }) {
  const [api, setApi] = useState(apiKey.get());
  const [admin, setAdmin] = useState(adminKey.get());
  const close = () => keyWanted.set(null);
  const submit = (event) => {
    event.preventDefault();
    apiKey.set(api.trim());
    adminKey.set(admin.trim());
    close();
    refreshModels(true);
  };
  const field = (id, label, value, set, first) => html`<label for=${id}>${label}</label>
    <input id=${id} type="password" autocomplete="off" spellcheck=${false} value=${value} autofocus=${first}
      onInput=${(e) => set(e.currentTarget.value)} />`;
  return html`<${Dialog} title="Keys" onClose=${close}>
    <form onSubmit=${submit} class="stack">
      ${REASONS[wanted] && html`<p class="note">${REASONS[wanted]}</p>`}
      ${field("api-key", "API key", api, setApi, wanted !== "admin")}
      ${field("admin-key", "Admin key (for Operate)", admin, setAdmin, wanted === "admin")}
      <p class="hint">Keys stay in this tab and go to this server only. They are gone when the tab is closed.</p>
      <div class="buttons"><button type="submit" class="primary">Use these keys</button>
        <button type="button" onClick=${() => { setApi(""); setAdmin(""); }}>Clear</button></div>
    </form>
  <//>`;
}
