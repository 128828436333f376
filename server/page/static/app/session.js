// The keys of this tab. They live in the session storage alone: they are gone when the tab is closed, are never written to
// a conversation, and are sent to this server only.
import { cell } from "./ui.js";

function kept(name) {
  const found = cell(sessionStorage.getItem(name) ?? "");
  found.watch(() => {
    if (found.get()) sessionStorage.setItem(name, found.get());
    else sessionStorage.removeItem(name);
  });
  return found;
}

export const apiKey = kept("guanaco.apiKey");
export const adminKey = kept("guanaco.adminKey");
// Why the dialog for keys is open: "api" or "admin" (a request needs that key), "settings" (the reader opened it); null: closed.
export const keyWanted = cell(null);
