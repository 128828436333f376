// Chat: the list of conversations on the left, the open conversation on the right.
import { current, openConversation, startConversation, changed } from "./conversations.js";
import { firstName, models } from "../app/models.js";
import { html, useEffect, useState, useValue } from "../app/ui.js";
import { Composer } from "./composer.js";
import { Introduction, Picker } from "../app/picker.js";
import { SamplingPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { ContextMeter, Thread } from "./thread.js";

export function Chat({ rest }) {
  const shown = useValue(current)?.conversation ?? null;
  const known = useValue(models);
  const [isTuning, setTuning] = useState(false);
  const [isListOpen, setListOpen] = useState(false);
  const id = rest[0] ?? "";
  useEffect(() => {
    setListOpen(false);
    if (!id) startConversation("chat", (shown?.kind === "chat" && shown.model) || firstName() || "");
    else {
      openConversation(id).then((found) => {
        if (!found) location.hash = "#/chat";
      });
    }
  }, [id]);
  useEffect(() => {
    if (shown && !shown.model && known) choose(shown, firstName());
  }, [known, shown]);
  if (!shown) return html`<p class="empty">Opening the conversation …</p>`;
  return html`<div class=${`chat ${isListOpen ? "list-open" : ""}`}>
    <h1 class="unseen">Chat</h1>
    <${Sidebar} shownId=${shown.id} isOpen=${isListOpen} onClose=${() => setListOpen(false)} />
    <section class="talk" aria-label="Conversation">
      <div class="bar">
        <button type="button" class="only-narrow" aria-expanded=${isListOpen} aria-controls="conversations"
          onClick=${() => setListOpen(!isListOpen)}>☰<span class="unseen"> Conversations</span></button>
        <${Picker} id="model" label="Model" value=${shown.model} onChange=${(name) => choose(shown, name)} />
        <${ContextMeter} conversation=${shown} />
        <button type="button" class="push" aria-expanded=${isTuning} aria-controls="settings"
          onClick=${() => setTuning(!isTuning)}>Settings</button>
      </div>
      ${isTuning && html`<${SamplingPanel} conversation=${shown} onClose=${() => setTuning(false)} />`}
      <${Thread} conversation=${shown}
        empty=${html`<${Introduction} chosen=${shown.model} onChoose=${(name) => choose(shown, name)} />`} />
      <${Composer} conversation=${shown} />
    </section>
  </div>`;
}

export function choose(conversation, name) {
  if (!name || conversation.model === name) return;
  conversation.model = name;
  changed(conversation);
}
