// Conversations in this browser (IndexedDB). The list needs titles only, so bodies lie in a store of their own.
// Where a browser has no IndexedDB (some private windows), they live as long as the tab.
const LIST = "list";
const BODIES = "bodies";

const memory = new Map();
let opening = null;

function open() {
  opening ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open("guanaco", 1);
    } catch {
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => {
      request.result.createObjectStore(LIST, { keyPath: "id" });
      request.result.createObjectStore(BODIES, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
  return opening;
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

export function entryOf({ id, kind, title, model, updated, created }) {
  return { id, kind, title, model, updated, created };
}

export async function isKept() {
  return (await open()) !== null;
}

// The list's entry of each conversation, the latest first.
export async function listAll() {
  const db = await open();
  const found = db
    ? await done(db.transaction(LIST).objectStore(LIST).getAll())
    : [...memory.values()].map(entryOf);
  return found.sort((a, b) => b.updated - a.updated);
}

export async function load(id) {
  const db = await open();
  return (db ? await done(db.transaction(BODIES).objectStore(BODIES).get(id)) : memory.get(id)) ?? null;
}

// Rejects if the browser's storage is full.
export async function saveAll(conversations) {
  const db = await open();
  if (!db) {
    for (const conversation of conversations) memory.set(conversation.id, structuredClone(conversation));
    return;
  }
  const transaction = db.transaction([LIST, BODIES], "readwrite");
  for (const conversation of conversations) {
    transaction.objectStore(LIST).put(entryOf(conversation));
    transaction.objectStore(BODIES).put(conversation);
  }
  await finished(transaction);
}

export async function remove(ids) {
  const db = await open();
  for (const id of ids) memory.delete(id);
  if (!db) return;
  const transaction = db.transaction([LIST, BODIES], "readwrite");
  for (const id of ids) {
    transaction.objectStore(LIST).delete(id);
    transaction.objectStore(BODIES).delete(id);
  }
  await finished(transaction);
}

export async function loadAll() {
  const db = await open();
  return db ? done(db.transaction(BODIES).objectStore(BODIES).getAll()) : [...memory.values()];
}
