// Blind votes: kept in this browser, counted with an interval, and written as CSV that `guanaco compare --replay` reads. The
// server stores none.
import { download } from "../app/format.js";
import { cell } from "../app/ui.js";

const KEY = "guanaco.votes";
const BENCHMARK = "page";
const Z = 1.959964; // of a 95 % interval

export const votes = cell(read());

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter(isVote) : [];
  } catch {
    return [];
  }
}

function isVote(vote) {
  return [vote?.first, vote?.second, vote?.prompt].every((text) => typeof text === "string") && [1, 2, 3].includes(vote.verdict);
}

function keep(next) {
  votes.set(next);
  localStorage.setItem(KEY, JSON.stringify(next));
}

// first, second: the names on the left and on the right. verdict: 1 the first is better, 2 the second, 3 a tie.
export function addVote({ first, second, prompt, verdict }) {
  keep([...votes.get(), { first, second, prompt, verdict, at: Date.now() }]);
}

export const undoVote = () => keep(votes.get().slice(0, -1));
export const clearVotes = () => keep([]);

// Questions by number, in the order in which they were first asked.
export function questionsOf(list) {
  return [...new Set(list.map(({ prompt }) => prompt))];
}

export function toCsv(list) {
  const questions = questionsOf(list);
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const rows = list.map(({ first, second, prompt, verdict }) =>
    [BENCHMARK, quoted(first), quoted(second), questions.indexOf(prompt), verdict].join(","));
  return ["benchmark,first,second,question,verdict", ...rows, ""].join("\n");
}

export function downloadVotes() {
  const day = new Date().toISOString().slice(0, 10);
  download(`votes-${day}.csv`, "text/csv", toCsv(votes.get()));
}

export function downloadQuestions() {
  const lines = questionsOf(votes.get()).map((text, number) => JSON.stringify({ question_id: number, text }));
  download("questions.jsonl", "application/jsonl", `${lines.join("\n")}\n`);
}

// For each pair of names: wins of either, ties, and the first's share with Wilson's interval; a tie counts half.
export function tally(list) {
  const pairs = new Map();
  for (const { first, second, verdict } of list) {
    const [a, b] = [first, second].sort();
    const key = JSON.stringify([a, b]);
    const pair = pairs.get(key) ?? { a, b, winsA: 0, winsB: 0, ties: 0 };
    const winner = verdict === 3 ? null : verdict === 1 ? first : second;
    if (winner === null) pair.ties += 1;
    else if (winner === a) pair.winsA += 1;
    else pair.winsB += 1;
    pairs.set(key, pair);
  }
  return [...pairs.values()].map((pair) => {
    const total = pair.winsA + pair.winsB + pair.ties;
    return { ...pair, total, ...wilson((pair.winsA + pair.ties / 2) / total, total) };
  });
}

export function wilson(share, total) {
  const square = (Z * Z) / total;
  const middle = (share + square / 2) / (1 + square);
  const half = (Z * Math.sqrt((share * (1 - share)) / total + square / (4 * total))) / (1 + square);
  return { share, low: Math.max(0, middle - half), high: Math.min(1, middle + half) };
}
