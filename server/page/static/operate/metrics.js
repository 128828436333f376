// Numbers of GET /metrics: parses the Prometheus text, and computes the changes between two requests.
import { send } from "../app/api.js";
import { cell } from "../app/ui.js";

const KEPT = 120; // samples of the sparklines
const PROMPT_TOKENS = "guanaco_adapter_prompt_tokens_total";

// { series, now, history }; null before the first answer. now is the last of history, a list of { time, running, waiting, kv,
// step, first, gap, prompt, rate, rates }. step, first and gap are in seconds, prompt and rate in tokens/s.
export const metrics = cell(null);
export const metricsProblem = cell(null);
let before = null;

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

// Series by name: a list of { labels, value }.
export function parse(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    if (!series.has(match[1])) series.set(match[1], []);
    series.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return series;
}

export const total = (series, name) => (series.get(name) ?? []).reduce((sum, { value }) => sum + value, 0);

export function byLabel(series, name, label) {
  return Object.fromEntries((series.get(name) ?? []).map(({ labels, value }) => [labels[label], value]));
}

// The mean of a histogram between two requests, in its own unit; null if nothing was counted.
function meanBetween(now, then, name) {
  const count = total(now, `${name}_count`) - total(then, `${name}_count`);
  const sum = total(now, `${name}_sum`) - total(then, `${name}_sum`);
  return count > 0 && sum >= 0 ? sum / count : null;
}

export async function lookAtMetrics() {
  try {
    const series = parse(await (await send("metrics", { quiet: true })).text());
    const time = Date.now();
    const sample = {
      time, running: total(series, "vllm:num_requests_running"), waiting: total(series, "vllm:num_requests_waiting"),
      kv: total(series, "vllm:kv_cache_usage_perc"), step: null, first: null, gap: null, rate: null, prompt: null, rates: {},
    };
    if (before) {
      const passed = (time - before.time) / 1000;
      sample.step = meanBetween(series, before.series, "guanaco_step_seconds");
      sample.first = meanBetween(series, before.series, "vllm:time_to_first_token_seconds");
      sample.gap = meanBetween(series, before.series, "vllm:inter_token_latency_seconds");
      const [now, then] = [series, before.series].map((at) => byLabel(at, "guanaco_adapter_generation_tokens_total", "adapter"));
      for (const [name, value] of Object.entries(now)) sample.rates[name] = Math.max(0, value - (then[name] ?? 0)) / passed;
      sample.prompt = Math.max(0, total(series, PROMPT_TOKENS) - total(before.series, PROMPT_TOKENS)) / passed;
      sample.rate = Object.values(sample.rates).reduce((sum, value) => sum + value, 0);
    }
    before = { time, series };
    metrics.set({ series, now: sample, history: [...(metrics.get()?.history ?? []), sample].slice(-KEPT) });
    metricsProblem.set(null);
  } catch (failure) {
    metricsProblem.set(failure);
  }
}
