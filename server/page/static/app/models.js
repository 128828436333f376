// The models that this server offers: the base, its adapters, aliases. Refreshed while the page is open.
import { getJson } from "./api.js";
import { cell } from "./ui.js";

// null until the first answer; then { base, adapters, aliases }, each a list of entries of GET /v1/models.
export const models = cell(null);
export const modelsProblem = cell(null);

let hasAsked = false;

// Asks the server again. After 401 the reader is asked for a key only the first time, or if `isWanted`: a reader who closed
// that dialog is left alone.
export async function refreshModels(isWanted = false) {
  const quiet = hasAsked && isWanted !== true;
  hasAsked = true;
  try {
    const { data } = await getJson("v1/models", { quiet });
    models.set({
      base: data.filter((card) => !card.parent),
      adapters: data.filter((card) => card.parent && card.version),
      // An alias has no version of its own: each request may lead to another one.
      aliases: data.filter((card) => card.parent && !card.version),
    });
    modelsProblem.set(null);
  } catch (failure) {
    modelsProblem.set(failure);
  }
}

export function cardOf(name) {
  const known = models.get();
  if (!known) return null;
  return [...known.base, ...known.adapters, ...known.aliases].find((card) => card.id === name) ?? null;
}

export function baseName() {
  return models.get()?.base[0]?.id ?? null;
}

export function firstName() {
  const known = models.get();
  return known?.adapters[0]?.id ?? baseName();
}

// The sampling defaults of a model, under the server's names; null if the server does not tell them.
export function defaultsOf(name) {
  return cardOf(name)?.sampling_defaults ?? null;
}
