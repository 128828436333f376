"""The report of a comparison in Markdown, and the tables and sentences of every report."""

from collections.abc import Iterator, Sequence
from typing import Any

from guanaco.server.judging.replay import rank

Table = tuple[str, list[str], list[list[str]]]  # title, heads, rows


def share(value: float | None) -> str:
    """A share (0 to 1) as a percentage; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables of a report in any format: titles, heads and rows of plain text."""
    for name, told in result["benchmarks"].items():
        yield _pairs(f"Win rates on {name}", told["pairs"])
        yield from _at_equal_lengths(told["pairs"])
        yield _players(told["players"], result)
    for what, groups in result["breakdown"].items():
        rows = [
            [
                group,
                f"{p['player']} against {p['other']}",
                str(p["prompts"]),
                share(p["rate"]),
                _between(p),
                str(p["ties"]),
            ]
            for group, pairs in groups.items()
            for p in pairs
        ]
        if rows:
            yield f"By {what}", [what, "pair", "prompts", "win rate", "95 % interval", "ties"], rows
    yield from _checks(result)
    if result["judge"]:
        yield _judge(result)


def _pairs(title: str, pairs: Sequence[dict[str, Any]]) -> Table:
    heads = ["pair", "prompts", "win rate", "95 % interval", "wins", "ties", "losses", "orders agree", "unreadable"]
    rows = [
        [
            f"{p['player']} against {p['other']}", str(p["prompts"]), share(p["rate"]), _between(p), str(p["wins"]),
            str(p["ties"]), str(p["losses"]), share(p["agreement"]), f"{p['unreadable']} of {p['verdicts']}",
        ]
        for p in pairs
    ]  # fmt: skip
    return title, heads, rows


def _at_equal_lengths(pairs: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """The win rates that are computed for answers of equal length. Stored verdicts have no lengths, so no table."""
    rows = [
        [f"{p['player']} against {p['other']}", share(p["rate"]), share(of["rate"]), _between(of)]
        for p in pairs
        if (of := p.get("length_controlled"))
    ]
    if rows:
        yield "Win rates at equal lengths", ["pair", "win rate", "at equal lengths", "95 % interval"], rows


def _players(players: dict[str, dict[str, Any]], result: dict[str, Any]) -> Table:
    heads = ["player", "Bradley-Terry", "95 % interval", "Elo (K 32)"]
    percent = result.get("percent_of_reference")
    if percent:
        heads += [f"percent of {result['reference']}", "95 % interval"]
    rows = []
    for name in rank(players):
        of = players[name]
        low, high = of["interval"] or (None, None)
        row = [
            name,
            f"{of['bradley_terry']:.0f}",
            "-" if low is None else f"{low:.0f} to {high:.0f}",
            f"{of['elo']:.0f}",
        ]
        if percent:
            ends = result["percent_interval"].get(name)
            row += [f"{percent[name]:.2f}", f"{ends[0]:.1f} to {ends[1]:.1f}"] if ends else ["-", "-"]
        rows.append(row)
    return "Ratings", heads, rows


def _checks(result: dict[str, Any]) -> Iterator[Table]:
    figures = result["checks"]["contestants"]
    names = list(next(iter(figures.values()))["checks"]) if figures else []
    heads = ["contestant", "answers", "failed", "empty", "mean characters", "mean tokens", "run-on", *names]
    rows = []
    for name, of in figures.items():
        means = [_number(of["mean_characters"]), _number(of["mean_tokens"])]
        passed = [share(of["checks"][check]["share"]) for check in names]
        rows.append(
            [name, str(of["answers"]), str(of["failed"]), str(of["empty"]), *means, share(of["run_on_rate"]), *passed]
        )
    yield "Answers without a judge", heads, rows
    same = [[f"{p['player']} and {p['other']}", share(p["share"])] for p in result["checks"]["identical"]]
    if same:
        yield "Identical answers", ["pair", "share"], same
    if result["perplexity"]:
        of_answers = [
            [name, _number(of["perplexity"], 3), str(of.get("tokens", "-")), of.get("reason", "")]
            for name, of in result["perplexity"].items()
        ]
        yield "Perplexity of the reference answers", ["contestant", "perplexity", "tokens", "why not"], of_answers


def _judge(result: dict[str, Any]) -> Table:
    judge = result["judge"]
    rows = [["judge", judge["name"]]]
    rows.append(["decided verdicts for the first answer", share(judge["bias"]["first_wins"])])
    rows.append(["decided verdicts for the longer answer", share(judge["bias"]["longer_wins"])])
    if judge["usage"]:
        rows += [[name.replace("_", " "), str(count)] for name, count in judge["usage"].items()]
    if judge["cost_of_this_run"] is not None:
        rows.append(["cost of this run", f"{judge['cost_of_this_run']:.4f}"])
    return "Judge", ["what", "value"], rows


def _between(pair: dict[str, Any]) -> str:
    return f"{share(pair['interval'][0])} to {share(pair['interval'][1])}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def headline(result: dict[str, Any]) -> list[str]:
    """The result of a comparison, in sentences."""
    return result["in_words"] or ["No judge was asked: the figures below need none."]


def conditions(result: dict[str, Any]) -> str:
    """The conditions of a comparison in one sentence."""
    sampling, prompts = result["sampling"], result["prompts"]
    return (
        f"{result['benchmark']}, {prompts['count']} prompts (SHA-256 {prompts['sha256'][:16]}), {result['created']}; "
        f"temperature {sampling['temperature']}, top_p {sampling['top_p']}, at most {sampling['max_tokens']} tokens, "
        f"seed {sampling['seed']}."
    )


def markdown(result: dict[str, Any]) -> str:
    """The report as Markdown. Texts from outside cannot make markup in it."""
    lines = ["# Comparison", "", _plain(conditions(result)), ""]
    lines += [f"- **{_plain(sentence)}**" for sentence in headline(result)]
    if result["warnings"]:
        lines += ["", "Warnings:", "", *(f"- {_plain(warning)}" for warning in result["warnings"])]
    for title, heads, rows in tables(result):
        lines += ["", f"## {_plain(title)}", "", _row(heads), _row(["---"] * len(heads), plain=False)]
        lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str], *, plain: bool = True) -> str:
    return "| " + " | ".join(_plain(cell) if plain else cell for cell in cells) + " |"


def _plain(text: str) -> str:
    """A text as one line, with all characters of Markdown and HTML escaped."""
    text = " ".join(text.split())
    for character in "\\`*_[]<>|#&":
        text = text.replace(character, f"\\{character}" if character not in "<>&" else f"&#{ord(character)};")
    return text
