"""`guanaco bench rows`: the shortest times, taken in turns, and a word about every cliff."""

import json
from itertools import count
from pathlib import Path

import pytest
from typer.testing import CliRunner

from guanaco.kernels.cpu import library
from guanaco.server.commands.bench.rows import remarks, time_rows
from guanaco.server.commands.main import app
from support.models.tiny_models import make_tiny_llama


def test_all_take_turns_and_the_shortest_time_counts() -> None:
    order: list[tuple[str, int]] = []
    ticks = count()
    slow_first = [0.0]

    def clock() -> float:
        return next(ticks) + slow_first[0]

    def run(name: str, rows: int) -> None:
        order.append((name, rows))
        if len(order) == 5:  # the first timed step is disturbed
            slow_first[0] = 100.0

    runs = {name: (lambda rows, name=name: run(name, rows)) for name in ("a", "b")}
    assert time_rows(runs, (1, 2), 2, clock) == {"a": {1: 1.0, 2: 1.0}, "b": {1: 1.0, 2: 1.0}}
    assert order[4:8] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_a_cliff_and_a_slower_set_are_named() -> None:
    good = {1: 1.0, 2: 1.3, 3: 1.6, 4: 1.8}
    assert remarks({"avx2": good, "avx512": {rows: value * 0.9 for rows, value in good.items()}}) == []
    assert remarks({"avx2": {**good, 2: 1.75}}) == ["avx2: 2 rows take longer than 3"]
    assert remarks({"avx2": good, "avx512": {**good, 3: 1.7}}) == ["avx512 is slower than avx2 at 3 rows"]


def test_the_command_times_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUANACO_CACHE", str(tmp_path / "cache"))
    words = ["bench", "rows", "--model", str(make_tiny_llama(tmp_path / "model")), "--most", "3", "--rounds", "1"]
    names = list(library.available_isas())[:2]
    done = CliRunner().invoke(app, [*words, "--isas", ",".join(names), "--json"])
    assert done.exit_code == 0, done.output
    times = json.loads(done.stdout.splitlines()[-1])["s"]
    assert list(times) == names
    assert all(list(seconds) == ["1", "2", "3"] and min(seconds.values()) > 0 for seconds in times.values())
    table = CliRunner().invoke(app, [*words, "--isas", "portable"])
    assert "portable ms" in table.stdout
    twice = CliRunner().invoke(app, [*words, "--isas", "portable,portable"])
    assert "portable is named twice" in twice.output
