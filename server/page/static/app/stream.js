// One streamed answer: server-sent events to text, tokens, times and numbers.
import { ApiFailure, send, sentence } from "./api.js";

// The data of each event of a response. Lines may be cut anywhere between two reads.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trimStart();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function newAnswer() {
  return {
    state: "waiting", // then "streaming", at the end "done", "stopped" or "failed"
    text: "", tokens: [], error: null, finish: null, usage: null, versions: null, requestId: null,
    firstTokenMs: null, tokensPerSecond: null,
  };
}

// Asks for a chat completion and calls `onChange(answer)` after each event. Always resolves with the answer; an error is in
// `answer.error`. `signal` stops it.
export async function streamChat(body, { signal, onChange }) {
  const answer = newAnswer();
  const started = performance.now();
  let first = null;
  let last = null;
  try {
    const response = await send("v1/chat/completions", {
      method: "POST", signal, body: { ...body, stream: true, stream_options: { include_usage: true } },
    });
    answer.versions = response.headers.get("X-Adapter-Version");
    answer.requestId = response.headers.get("X-Request-Id");
    let complete = false;
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") {
        complete = true;
        break;
      }
      const event = JSON.parse(data);
      if (event.error) throw failureInStream(event.error);
      if (take(answer, event)) {
        last = performance.now();
        first ??= last;
        answer.state = "streaming";
        answer.firstTokenMs = first - started;
      }
      onChange(answer);
    }
    if (!complete) throw new ApiFailure({ code: "cut_off", message: "The connection ended before the answer did." });
    answer.state = "done";
  } catch (error) {
    if (error.name === "AbortError") answer.state = "stopped";
    else fail(answer, error);
  }
  const count = answer.usage?.completion_tokens ?? answer.tokens.length;
  if (first !== null && last > first && count > 1) answer.tokensPerSecond = ((count - 1) * 1000) / (last - first);
  onChange(answer);
  return answer;
}

// Adds one event to the answer. Returns whether the event had text.
function take(answer, event) {
  if (event.usage) answer.usage = event.usage;
  const choice = event.choices?.[0];
  if (!choice) return false;
  if (choice.finish_reason) answer.finish = choice.finish_reason;
  for (const item of choice.logprobs?.content ?? []) {
    answer.tokens.push({
      text: item.token, p: Math.exp(item.logprob),
      top: (item.top_logprobs ?? []).map((other) => ({ text: other.token, p: Math.exp(other.logprob) })),
    });
  }
  const text = choice.delta?.content;
  if (!text) return false;
  answer.text += text;
  return true;
}

function failureInStream(error) {
  return new ApiFailure({ code: error.code ?? null, message: sentence(error.message ?? "The answer failed") });
}

function fail(answer, error) {
  const known = error instanceof ApiFailure
    ? error
    : new ApiFailure({ code: "cut_off", message: "The connection to the server broke before the answer was complete." });
  answer.state = "failed";
  answer.error = {
    message: known.message, code: known.code, status: known.status, retryAfter: known.retryAfter,
    requestId: known.requestId, at: Date.now(),
  };
}

// Calls `work` at most once a frame with the latest value; in a hidden tab, which has no frames, a few times a second.
export function oncePerFrame(work) {
  let latest;
  let waiting = false;
  const run = () => {
    waiting = false;
    work(latest);
  };
  return (value) => {
    latest = value;
    if (waiting) return;
    waiting = true;
    if (document.visibilityState === "visible") requestAnimationFrame(run);
    else setTimeout(run, 250);
  };
}
