"""`guanaco compare --replay`: the statistics of stored verdicts and scores, as JSON or as tables."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guanaco.server.errors import CommandError
from guanaco.server.judging.replay import benchmark_statistics, percent_of_reference, rank
from guanaco.server.judging.stored import read_scores, read_verdicts


def run_replay(verdicts: Path, scores: Path | None, *, reference: str | None, seed: int, as_json: bool) -> None:
    """Print the statistics of a file of verdicts, and of one of scores if there is one: tables, or one JSON object."""
    if reference is not None and scores is None:
        raise CommandError("--reference is about scores: name their file with --scores")
    told: dict[str, Any] = {"benchmarks": benchmark_statistics(read_verdicts(verdicts), seed=seed)}
    if scores is not None:
        told |= percent_of_reference(read_scores(scores), reference, seed=seed)
    if as_json:
        print(json.dumps(told))
    else:
        show_statistics(told)


def show_statistics(told: dict[str, Any]) -> None:
    """Print tables for people: each benchmark's players, its pairs in words, and percentages of the reference."""
    console = Console(highlight=False)
    for name, benchmark in told["benchmarks"].items():
        table = Table("player", "Bradley-Terry", "95 % interval", "Elo (K 32)", title=escape(name), box=None)
        for player in rank(benchmark["players"]):
            of = benchmark["players"][player]
            between = "-" if of["interval"] is None else "{:.0f} to {:.0f}".format(*of["interval"])
            table.add_row(escape(player), f"{of['bradley_terry']:.0f}", between, f"{of['elo']:.0f}")
        console.print(table)
        agreement = benchmark["order_agreement"]
        console.print(
            f"{benchmark['verdicts']:,} verdicts, {benchmark['unreadable']:,} unreadable; same verdict in both orders: "
            + ("-" if agreement is None else f"{agreement:.0%}")
        )
        for line in [pair["in_words"] for pair in benchmark["pairs"]] + benchmark["warnings"]:
            console.print(f"  {escape(line)}", soft_wrap=True)
    if "percent_of_reference" in told:
        table = Table("player", f"percent of {escape(told['reference'])}", "95 % interval", box=None)
        for player, percent in sorted(told["percent_of_reference"].items(), key=lambda item: -item[1]):
            table.add_row(
                escape(player), f"{percent:.2f}", "{:.1f} to {:.1f}".format(*told["percent_interval"][player])
            )
        console.print(table)
        for line in told["warnings"]:
            console.print(f"  {escape(line)}", soft_wrap=True)
