// A conversation is a tree of messages: an edited message and a repeated answer are branches beside the old ones, and nothing
// is overwritten. `chosen` says which branch of each message is shown.
import { newId } from "../app/format.js";

const ROOT = "root";

export function newConversation(kind, model) {
  const now = Date.now();
  return {
    id: newId(), kind, title: "", model, mixture: {}, system: "", sampling: {}, created: now, updated: now,
    nodes: { [ROOT]: { id: ROOT, parent: null, role: "root", children: [], chosen: 0 } },
  };
}

export function addNode(conversation, parentId, fields) {
  const node = { id: newId(), parent: parentId, children: [], chosen: 0, text: "", ...fields };
  conversation.nodes[node.id] = node;
  const parent = conversation.nodes[parentId];
  parent.children.push(node.id);
  parent.chosen = parent.children.length - 1;
  return node;
}

// The messages that are shown, the oldest first.
export function shownPath(conversation) {
  const path = [];
  let node = conversation.nodes[ROOT];
  while (node.children.length) {
    node = conversation.nodes[node.children[node.chosen]];
    path.push(node);
  }
  return path;
}

export function lastId(conversation) {
  return shownPath(conversation).at(-1)?.id ?? ROOT;
}

export function siblings(conversation, node) {
  const parent = conversation.nodes[node.parent];
  return { number: parent.children.indexOf(node.id) + 1, total: parent.children.length };
}

export function chooseSibling(conversation, node, step) {
  const parent = conversation.nodes[node.parent];
  parent.chosen = Math.min(parent.children.length - 1, Math.max(0, parent.children.indexOf(node.id) + step));
}

// The messages of a request, up to and with `lastNode`. Messages without text are left out.
export function messagesUpTo(conversation, lastNode) {
  const path = [];
  for (let node = lastNode; node.role !== "root"; node = conversation.nodes[node.parent]) path.unshift(node);
  const messages = [];
  for (const { role, text } of path.filter((node) => node.text)) {
    // After a failed answer two questions follow each other, which many chat templates refuse. So they are joined.
    if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${text}`;
    else messages.push({ role, content: text });
  }
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...messages] : messages;
}

export function titleFrom(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 57)}…` : line;
}

// A checked copy of a conversation from a file, or null if it is none. Only known fields of it are copied.
export function checkedConversation(value) {
  const { id, nodes } = value ?? {};
  if (typeof id !== "string" || typeof nodes !== "object" || !nodes || !nodes[ROOT]) return null;
  const clean = newConversation(value.kind === "mix" ? "mix" : "chat", String(value.model ?? ""));
  Object.assign(clean, {
    id: id.slice(0, 64), title: String(value.title ?? "").slice(0, 200), system: String(value.system ?? ""),
    created: Number(value.created) || clean.created, updated: Number(value.updated) || clean.updated,
    sampling: plainObject(value.sampling), mixture: plainObject(value.mixture), nodes: {},
  });
  for (const [key, node] of Object.entries(nodes)) {
    if (key !== node?.id || !Array.isArray(node.children)) return null;
    const parentIsThere = key === ROOT || nodes[node.parent]?.children?.includes(key);
    if (!parentIsThere || !node.children.every((child) => nodes[child]?.parent === key)) return null;
    const chosen = Math.min(Math.max(0, Number(node.chosen) || 0), Math.max(0, node.children.length - 1));
    clean.nodes[key] = { ...structuredClone(node), text: String(node.text ?? ""), chosen };
  }
  return hasNoCircle(clean) ? clean : null;
}

function plainObject(value) {
  return value && typeof value === "object" && !Array.isArray(value) ? structuredClone(value) : {};
}

function hasNoCircle({ nodes }) {
  let reached = 0;
  const open = [ROOT];
  while (open.length) {
    reached += 1;
    if (reached > Object.keys(nodes).length) return false;
    open.push(...nodes[open.pop()].children);
  }
  return reached === Object.keys(nodes).length;
}
