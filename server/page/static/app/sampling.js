// How an answer is sampled: the fields of the form, and the fields of a request that are made from them. An empty field is
// not sent, so the server's defaults (the adapter's profile, then the model's) count.
export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, help: "0: always the likeliest token" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, help: "sample from the likeliest tokens that add up to p" },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, whole: true, help: "sample from the k likeliest tokens; 0: from all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, help: "leave out tokens below p times the likeliest one" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, help: "above 1: fewer repeated tokens; 1: off" },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 262144, step: 1, whole: true, help: "of the answer; empty: as many as fit" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, whole: true, help: "the same seed gives the same answer" },
];

const ALTERNATIVES = 5;

export function requestFields(sampling) {
  const fields = {};
  for (const { name, min, max, whole } of FIELDS) {
    const value = sampling[name];
    if (typeof value !== "number" || !Number.isFinite(value)) continue;
    const inside = Math.min(max, Math.max(min, value));
    fields[name] = whole ? Math.round(inside) : inside;
  }
  const stops = String(sampling.stop ?? "").split("\n").filter(Boolean).slice(0, 16);
  if (stops.length) fields.stop = stops;
  if (sampling.probabilities !== false) Object.assign(fields, { logprobs: true, top_logprobs: ALTERNATIVES });
  return fields;
}
