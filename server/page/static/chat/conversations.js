// The conversations of this browser: the list, the one that is shown, and the answers that are being written.
import { sentenceAnnouncer, announce } from "../app/announce.js";
import { download } from "../app/format.js";
import { baseName, defaultsOf, firstName, models, refreshModels } from "../app/models.js";
import { requestFields } from "../app/sampling.js";
import * as store from "./store.js";
import { oncePerFrame, streamChat } from "../app/stream.js";
import { addNode, checkedConversation, lastId, messagesUpTo, newConversation, titleFrom } from "./tree.js";
import { cell } from "../app/ui.js";

export const list = cell([]); // entries of the sidebar
export const current = cell(null); // { conversation }: a new object after each change of its tree
export const storageProblem = cell(null);

const SAVE_EVERY_MS = 1500;
const running = new Map(); // id of an answer → { controller, conversation }
const live = new Map(); // id of an answer that is being written → cell that counts its changes

export async function refreshList() {
  list.set(await store.listAll());
  if (!(await store.isKept())) {
    storageProblem.set("This browser keeps no data for the page: conversations are lost when the tab is closed.");
  }
}

export function show(conversation) {
  current.set(conversation ? { conversation } : null);
}

export async function openConversation(id) {
  const shown = current.get()?.conversation;
  if (shown?.id === id) return shown;
  const busy = [...running.values()].find(({ conversation }) => conversation.id === id);
  const conversation = busy?.conversation ?? (await store.load(id));
  if (conversation && !busy) endInterrupted(conversation);
  show(conversation);
  return conversation;
}

// Marks answers as failed that were being written when the page was closed or reloaded.
function endInterrupted(conversation) {
  for (const node of Object.values(conversation.nodes)) {
    if (node.state === "waiting" || node.state === "streaming") {
      node.state = "failed";
      node.error = { code: "page_closed", message: "The page was closed before the answer was complete.", at: 0 };
    }
  }
}

export function startConversation(kind, model) {
  const conversation = newConversation(kind, model);
  show(conversation);
  return conversation;
}

export async function changed(conversation) {
  if (current.get()?.conversation === conversation) current.set({ conversation });
  await save(conversation);
}

async function save(conversation, withTokens = true) {
  if (Object.keys(conversation.nodes).length === 1) return; // nothing was said yet
  try {
    // Probabilities are large: while an answer is being written, it is saved without them.
    await store.saveAll([withTokens ? conversation : withoutTokens(conversation)]);
    const others = list.get().filter((entry) => entry.id !== conversation.id);
    list.set([store.entryOf(conversation), ...others].sort((a, b) => b.updated - a.updated));
  } catch {
    storageProblem.set("The browser's storage is full: export your conversations and delete some.");
  }
}

function withoutTokens(conversation) {
  const nodes = Object.fromEntries(
    Object.entries(conversation.nodes).map(([id, node]) => [id, running.has(id) ? { ...node, tokens: [] } : node]),
  );
  return { ...conversation, nodes };
}

export function liveCell(nodeId) {
  return live.get(nodeId) ?? STILL;
}
const STILL = cell(0);

export function runningIn(conversation) {
  return [...running.entries()].filter(([, run]) => run.conversation === conversation).map(([id]) => id);
}

export function stop(conversation) {
  for (const id of runningIn(conversation)) running.get(id).controller.abort();
}

export function say(conversation, text) {
  conversation.title ||= titleFrom(text);
  const question = addNode(conversation, lastId(conversation), { role: "user", text });
  return answer(conversation, question);
}

export function edit(conversation, node, text) {
  const question = addNode(conversation, node.parent, { role: "user", text });
  return answer(conversation, question);
}

export function retry(conversation, node) {
  return answer(conversation, conversation.nodes[node.parent]);
}

// The request's fields that say which model answers: a name of the server, or the base with a mixture of adapters.
export function target(conversation) {
  if (conversation.kind !== "mix") return { model: conversation.model };
  const adapters = Object.entries(conversation.mixture)
    .filter(([, scale]) => scale !== 0)
    .map(([name, scale]) => ({ name, scale }));
  return adapters.length ? { model: baseName(), adapters } : { model: baseName() };
}

async function answer(conversation, question) {
  const node = addNode(conversation, question.id, {
    role: "assistant", state: "waiting", model: conversation.model, mixed: null, askedAt: Date.now(), tokens: [],
  });
  conversation.updated = Date.now();
  const controller = new AbortController();
  running.set(node.id, { controller, conversation });
  const ticks = cell(0);
  live.set(node.id, ticks);
  changed(conversation);
  if (!models.get()) { // the reader was faster than the list of models
    await refreshModels();
    conversation.model ||= firstName() ?? "";
  }
  const asked = target(conversation);
  Object.assign(node, { model: asked.model, mixed: asked.adapters ?? null, defaults: defaultsOf(asked.model) });
  const body = {
    ...asked, messages: messagesUpTo(conversation, question), ...requestFields(conversation.sampling),
  };
  const tell = sentenceAnnouncer();
  let savedAt = performance.now();
  const draw = oncePerFrame(() => {
    ticks.set(ticks.get() + 1);
    tell(node.text, false);
    if (performance.now() - savedAt > SAVE_EVERY_MS && running.has(node.id)) {
      savedAt = performance.now();
      save(conversation, false);
    }
  });
  await streamChat(body, {
    signal: controller.signal,
    onChange(part) {
      Object.assign(node, part);
      draw();
    },
  });
  running.delete(node.id);
  live.delete(node.id);
  conversation.updated = Date.now();
  tell(node.text, true);
  announce(endInWords(node));
  if (node.error?.code === "model_not_found") refreshModels();
  await changed(conversation);
}

function endInWords(node) {
  if (node.state === "failed") return `The answer failed. ${node.error.message}`;
  if (node.state === "stopped") return "The answer was stopped.";
  return node.finish === "length" ? "The answer was cut at its limit of tokens." : "The answer is complete.";
}

export async function deleteConversations(ids) {
  for (const { controller, conversation } of running.values()) if (ids.includes(conversation.id)) controller.abort();
  await store.remove(ids);
  const shown = current.get()?.conversation;
  if (shown && ids.includes(shown.id)) {
    show(null);
    location.hash = `#/${shown.kind}`; // where a new one begins
  }
  await refreshList();
}

export async function rename(id, title) {
  const conversation = await openConversation(id);
  if (conversation && title.trim()) {
    conversation.title = title.trim().slice(0, 200);
    await changed(conversation);
  }
}

export async function exportAll() {
  const conversations = await store.loadAll();
  const day = new Date().toISOString().slice(0, 10);
  const text = JSON.stringify({ format: "guanaco-conversations", version: 1, conversations });
  download(`guanaco-conversations-${day}.json`, "application/json", text);
  return conversations.length;
}

// Adds a file's conversations to this browser's. One with a known id replaces the one here. Returns the result as a sentence.
export async function importFile(file) {
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch {
    return "That file is not JSON. Choose a file that this page exported.";
  }
  if (found?.format !== "guanaco-conversations" || !Array.isArray(found.conversations)) {
    return "That file holds no conversations of this page.";
  }
  const checked = found.conversations.map(checkedConversation);
  const good = checked.filter(Boolean);
  await store.saveAll(good);
  await refreshList();
  const bad = checked.length - good.length;
  return `Imported ${good.length} conversations${bad ? `; ${bad} were damaged and left out` : ""}.`;
}
