// The columns of a comparison: who answers, the answers that come, and one prompt to all of them at the same moment.
import { announce } from "../app/announce.js";
import { requestFields } from "../app/sampling.js";
import { newAnswer, oncePerFrame, streamChat } from "../app/stream.js";
import { cell } from "../app/ui.js";

export const LEAST = 2;
export const MOST = 4;

// What is shown: { prompt, answers: [{ model, answer }], isBusy }, anew after each change.
export const round = cell(null);
let controller = null;

// Asks every model the same. Resolves when all have answered or `stopRound` was called.
export async function startRound(models, prompt, { system, sampling }) {
  stopRound();
  controller = new AbortController();
  const { signal } = controller;
  const answers = models.map((model) => ({ model, answer: newAnswer() }));
  const draw = oncePerFrame(() => {
    if (!signal.aborted || round.get()?.answers === answers) round.set({ ...round.get(), answers });
  });
  round.set({ prompt, answers, isBusy: true, id: Date.now() });
  const messages = [...(system.trim() ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  // Sent in one go, so that the server computes all columns in one batch.
  await Promise.all(answers.map(async (column) => {
    const body = { model: column.model, messages, ...requestFields({ ...sampling, probabilities: false }) };
    await streamChat(body, {
      signal,
      onChange(answer) {
        column.answer = { ...answer };
        draw();
      },
    });
  }));
  if (round.get()?.answers !== answers) return;
  round.set({ ...round.get(), answers, isBusy: false });
  announce(`All ${answers.length} answers are complete.`);
}

export function stopRound() {
  controller?.abort();
}
