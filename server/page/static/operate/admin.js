// The requests that need the admin key: list adapters and aliases, change them, stop the server.
import { getJson, send } from "../app/api.js";
import { refreshModels } from "../app/models.js";
import { adminKey } from "../app/session.js";
import { cell } from "../app/ui.js";

export const adapters = cell(null); // cards of GET /v1/adapters
export const aliases = cell(null);
// "unknown", "open", "needs a key", "off" (the server has no admin key) or "failed"
export const access = cell("unknown");

let refusedKey = null; // the key that was refused: asking again with it would change nothing

export async function refreshAdmin() {
  if (refusedKey === adminKey.get()) return;
  refusedKey = null;
  try {
    const [listed, named] = await Promise.all([
      getJson("v1/adapters", { admin: true, quiet: true }), getJson("v1/aliases", { admin: true, quiet: true }),
    ]);
    adapters.set(listed.data);
    aliases.set(named.data);
    access.set("open");
  } catch (failure) {
    adapters.set(null);
    aliases.set(null);
    if (failure.status === 401 || failure.status === 403) refusedKey = adminKey.get();
    access.set(failure.status === 401 ? "needs a key" : failure.status === 403 ? "off" : "failed");
  }
}

async function change(method, path, body) {
  const response = await send(path, { method, body, admin: true });
  const answer = await response.json();
  await Promise.all([refreshAdmin(), refreshModels()]);
  return answer;
}

const named = (kind, name, rest = "") => `v1/${kind}/${encodeURIComponent(name)}${rest}`;

export const loadAdapter = (name, source, profile) => change("PUT", named("adapters", name), profile ? { source, profile } : { source });
export const checkAdapter = (name, source) => change("POST", named("adapters", name, "/check"), { source });
export const rollbackAdapter = (name, version) => change("POST", named("adapters", name, "/rollback"), version ? { version } : {});
export const pinAdapter = (name, pinned) => change("POST", named("adapters", name, "/pin"), { pinned });
export const removeAdapter = (name, force) => change("DELETE", named("adapters", name, force ? "?force=true" : ""));
export const putAlias = (name, split, revision) => change("PUT", named("aliases", name), { split, expected_revision: revision });
export const rollbackAlias = (name) => change("POST", named("aliases", name, "/rollback"), {});
export const removeAlias = (name) => change("DELETE", named("aliases", name));
export const drain = () => change("POST", "v1/drain", {});

export const hasAdminKey = () => Boolean(adminKey.get());
