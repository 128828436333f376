"""The report of a comparison as one HTML file: pictures, tables and answers, no script, nothing from outside.

Answers are hostile text: they are escaped, their direction is kept inside their box, and the page's policy lets nothing
load, run or be sent.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from guanaco.server.judging.contestants import Answers
from guanaco.server.judging.pictures import bars, intervals
from guanaco.server.judging.prompts import Prompt
from guanaco.server.judging.replay import rank
from guanaco.server.judging.report import conditions, headline, share, tables

SHOWN_PROMPTS = 200  # with their answers; the others are in answers.jsonl
SHOWN_CHARACTERS = 8000  # of one text
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --rule: #d4d9df; --accent: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #9aa4af; --rule: #363d45; --accent: #6cb0ff; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.conditions { color: var(--soft); }
.words { font-size: 1.15rem; font-weight: 600; }
.warning { border-left: 4px solid #c77700; padding-left: .7rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
svg { width: 100%; max-width: 47.5rem; height: auto; display: block; }
svg text { font: 14px system-ui, sans-serif; fill: var(--ink); }
svg .label { text-anchor: end; } svg .axis { fill: var(--soft); font-size: 12px; } svg .end { text-anchor: end; }
svg .equal { stroke: var(--soft); stroke-dasharray: 4 4; } svg .bar { stroke: var(--accent); stroke-width: 4; }
svg .dot, svg .fill { fill: var(--accent); }
details { border: 1px solid var(--rule); border-radius: 6px; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: .9rem/1.45 ui-monospace, monospace;
  border-left: 3px solid var(--rule); padding-left: .8rem; margin: .3rem 0 1rem; }
"""


def policy_of(style: str) -> str:
    """A Content-Security-Policy under which only this one style sheet applies."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def html_report(result: dict[str, Any], prompts: Sequence[Prompt], answers: Answers) -> str:
    """The report as one HTML file that opens without a network."""
    names = ", ".join(card["name"] for card in result["contestants"])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy_of(_STYLE))}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>Comparison of {escape(names)}</title>",
        f"<style>{_STYLE}</style></head><body><main>",
        f"<h1>Comparison of {escape(names)}</h1>",
        f'<p class="conditions">{escape(conditions(result))}</p>',
        *(f'<p class="words">{escape(sentence)}</p>' for sentence in headline(result)),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in result["warnings"]),
        *_pictures(result),
        *(_table(*table) for table in tables(result)),
        *_answers(prompts, answers, [card["name"] for card in result["contestants"]]),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _pictures(result: dict[str, Any]) -> Iterator[str]:
    for told in result["benchmarks"].values():
        rows = [
            (f"{p['player']} : {p['other']}", p["rate"], *p["interval"], f"{share(p['rate'])} of {p['prompts']}")
            for p in told["pairs"]
        ]
        title = "Win rates with 95 % intervals; the dashed line is one half"
        yield f"<h2>{title}</h2>" + intervals(rows, low=0, high=1, line=0.5, title=title)
        players = told["players"]
        rated = [(name, players[name]["bradley_terry"], *players[name]["interval"]) for name in rank(players)
                 if players[name]["interval"]]  # fmt: skip
        if rated:
            low, high = min(r[2] for r in rated), max(r[3] for r in rated)
            edge = max(20.0, (high - low) * 0.05)
            title = "Bradley-Terry ratings with 95 % intervals; the dashed line is the mean"
            yield f"<h2>{title}</h2>" + intervals(
                [(*r, f"{r[1]:.0f} ({r[2]:.0f} to {r[3]:.0f})") for r in rated],
                low=round(low - edge), high=round(high + edge), line=1000, title=title,
            )  # fmt: skip
    lengths = [
        (name, of["mean_characters"], f"{of['mean_characters']:.0f}")
        for name, of in result["checks"]["contestants"].items()
        if of["mean_characters"] is not None
    ]
    if lengths:
        yield "<h2>Mean length of the answers in characters</h2>" + bars(lengths, title="Mean length of the answers")


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(title)}</h2><div class="scroll">{table}</div>'


def _answers(prompts: Sequence[Prompt], answers: Answers, names: Sequence[str]) -> Iterator[str]:
    yield "<h2>Answers</h2>"
    if len(prompts) > SHOWN_PROMPTS:
        yield f"<p>The first {SHOWN_PROMPTS} of {len(prompts)} prompts; all answers are in answers.jsonl.</p>"
    for prompt in prompts[:SHOWN_PROMPTS]:
        shown = [f"<details><summary>{escape(_cut(prompt.shown, 160))}</summary>", f"<pre>{_text(prompt.shown)}</pre>"]
        for name in names:
            answer = answers[name, prompt.id]
            text = answer.text if answer.error is None else f"(no answer: {answer.error})"
            shown.append(f"<h3>{escape(name)}</h3><pre>{_text(text)}</pre>")
        yield "".join(shown) + "</details>"


def _text(text: str) -> str:
    return escape(_cut(text, SHOWN_CHARACTERS)).replace("\x00", "\ufffd")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"
