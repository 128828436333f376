// The columns of a comparison: sends one prompt to several models at once, and holds their answers as they come.
import { announce } from "../app/announce.js";
import { requestFields } from "../app/sampling.js";
import { newAnswer, oncePerFrame, streamChat } from "../app/stream.js";
import { cell } from "../app/ui.js";

export const LEAST = 2;
export const MOST = 4;

// The round on the page: { id, prompt, answers: [{ model, answer }], isBusy }; a new object after each change.
export const round = cell(null);
let controller = null;

// Asks every model the same prompt. Resolves when all have answered, or after `stopRound`.
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
