"""The report of a comparison as one HTML file: pictures, tables and answers, without scripts or other files.

Answers are hostile text: they are escaped, their direction is kept inside their box, and the page's policy lets nothing
load, run or be sent.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from guanaco.server.judging.contestants import Answers
from guanaco.server.judging.prompts import Prompt
from guanaco.server.judging.replay import rank
from guanaco.server.judging.report import conditions, headline, share, tables
from guanaco.server.reports.page import page, table
from guanaco.server.reports.pictures import bars, intervals

SHOWN_PROMPTS = 200  # prompts with their answers; the others are in answers.jsonl
SHOWN_CHARACTERS = 8000  # of one prompt or answer


def html_report(result: dict[str, Any], prompts: Sequence[Prompt], answers: Answers) -> str:
    """The report as one HTML file that opens without a network."""
    names = ", ".join(card["name"] for card in result["contestants"])
    parts = [
        f'<p class="conditions">{escape(conditions(result))}</p>',
        *(f'<p class="words">{escape(sentence)}</p>' for sentence in headline(result)),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in result["warnings"]),
        *_pictures(result),
        *(table(*of) for of in tables(result)),
        *_answers(prompts, answers, [card["name"] for card in result["contestants"]]),
    ]
    return page(f"Comparison of {names}", parts)


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
