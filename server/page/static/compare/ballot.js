// Blind votes: two answers without names, a vote by key or click, and the count of all votes.
import { announce } from "../app/announce.js";
import { percent } from "../app/format.js";
import { addVote, clearVotes, downloadQuestions, downloadVotes, tally, undoVote, votes } from "./votes.js";
import { Confirm, html, useEffect, useLayoutEffect, useRef, useState, useValue } from "../app/ui.js";
import { Column } from "./column.js";

const CHOICES = [[1, "Left is better"], [2, "Right is better"], [3, "Tie"]];

export function Ballot({ shown, hasNext, onNext, onAgain }) {
  const [verdict, setVerdict] = useState(null);
  const section = useRef();
  const [left, right] = shown.answers;
  const isComplete = !shown.isBusy && shown.answers.every(({ answer }) => answer.state === "done" && answer.text);
  const vote = (choice) => {
    if (!isComplete || verdict) return;
    addVote({ first: left.model, second: right.model, prompt: shown.prompt, verdict: choice });
    setVerdict(choice);
    announce(`Vote counted. Left was ${left.model}, right was ${right.model}.`);
  };
  useLayoutEffect(() => { // a key pressed right after the verdict is drawn must find the new handler
    const onKey = (event) => {
      if (event.target.closest?.("input, textarea, select, dialog") || event.ctrlKey || event.altKey || event.metaKey) return;
      if (["1", "2", "3"].includes(event.key)) vote(Number(event.key));
      if (event.key === "Enter" && verdict && hasNext && !event.target.closest("button, a")) onNext();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });
  useEffect(() => {
    section.current.focus(); // the keys 1, 2 and 3 are for voting now, not for the prompt
  }, []);
  return html`<section class="ballot" ref=${section} tabindex="-1" aria-label="Blind comparison; vote with the keys 1, 2 and 3">
    <p class="asked">“${shown.prompt}”</p>
    <div class="columns">
      <${Column} title=${verdict ? left.model : "Left"} answer=${left.answer} isNamed=${Boolean(verdict)} />
      <${Column} title=${verdict ? right.model : "Right"} answer=${right.answer} isNamed=${Boolean(verdict)} />
    </div>
    <div class="buttons vote" role="group" aria-label="Your vote">
      ${CHOICES.map(([choice, label]) => html`<button key=${choice} type="button" disabled=${!isComplete || verdict}
        aria-pressed=${verdict === choice} onClick=${() => vote(choice)}><kbd>${choice}</kbd> ${label}</button>`)}
      ${verdict && html`<button type="button" onClick=${() => { undoVote(); setVerdict(null); }}>Take it back</button>`}
      ${verdict && hasNext && html`<button type="button" class="primary" onClick=${onNext}>Next prompt</button>`}
      ${!verdict && !shown.isBusy && !isComplete && html`<button type="button" onClick=${onAgain}>Ask again</button>`}
    </div>
  </section>`;
}

export function Results() {
  const list = useValue(votes);
  const [isAsking, setAsking] = useState(false);
  if (!list.length) return null;
  return html`<section class="panel" aria-labelledby="results">
    <h2 id="results">Your ${list.length} blind votes</h2>
    <div class="scroll" tabindex="0" role="group" aria-label="A table that may scroll sideways"><table>
      <thead><tr><th>Pair</th><th class="number">Wins</th><th class="number">Ties</th><th class="number">Losses</th>
        <th class="number">Share of the first</th><th>95 % interval</th></tr></thead>
      <tbody>${tally(list).map((pair) => html`<tr key=${`${pair.a}/${pair.b}`}>
        <th scope="row">${pair.a} against ${pair.b}</th><td class="number">${pair.winsA}</td><td class="number">${pair.ties}</td>
        <td class="number">${pair.winsB}</td><td class="number">${percent(pair.share)}</td>
        <td>${percent(pair.low)} to ${percent(pair.high)} <small>${inWords(pair)}</small></td></tr>`)}</tbody></table></div>
    <p class="hint">A tie counts half. Votes stay in this browser; <code>guanaco compare --replay</code> reads the file.</p>
    <div class="buttons"><button type="button" onClick=${downloadVotes}>Download the votes (CSV)</button>
      <button type="button" onClick=${downloadQuestions}>Download the prompts</button>
      <button type="button" onClick=${() => setAsking(true)}>Delete the votes</button></div>
    ${isAsking && html`<${Confirm} title="Delete all votes?" text=${`All ${list.length} votes will be gone. Download them first to keep them.`}
      yes="Delete" onYes=${clearVotes} onClose=${() => setAsking(false)} />`}
  </section>`;
}

function inWords({ a, b, low, high }) {
  if (low > 0.5) return `${a} is preferred`;
  if (high < 0.5) return `${b} is preferred`;
  return "not decided: vote on";
}
