"""What a step takes: timed once, kept, and timed again where anything that it depends on has changed."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from guanaco.server.bootstrap import speculation
from guanaco.server.bootstrap.speculation import is_disturbed, make_drafting, measure
from guanaco.server.config import Settings, load_settings
from guanaco.server.engine.speculation.costs import StepCosts

OPS = SimpleNamespace(name="cpu", isa="avx2", device=SimpleNamespace(type="cpu"))
GPU = SimpleNamespace(name="triton", device=SimpleNamespace(type="cuda"))


class Timed:
    """A clock on which a step takes 10 + 3 · rows, but for disturbances; counts the steps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs = Counter[int]()

    def run(self, rows: int) -> None:
        self.runs[rows] += 1
        self.now += (10 + 3 * rows) / 1000 + (0.5 if self.runs[rows] == 2 else 0.0)

    def clock(self) -> float:
        return self.now


def settings_of(tmp_path: Path, **fields: object) -> Settings:
    return load_settings({"cache": str(tmp_path), **fields})


def test_the_shortest_round_counts_and_time_is_limited() -> None:
    timed = Timed()
    costs = measure(timed.run, timed.clock)
    assert costs.points == [(rows, pytest.approx((10 + 3 * rows) / 1000)) for rows in sorted(timed.runs)]
    assert costs.seconds(40) == pytest.approx(0.130), "by the line through the last two"
    assert set(timed.runs.values()) == {3}, "half a second of disturbance for each count ends the timing early"


def test_costs_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    monkeypatch.setattr(speculation, "is_disturbed", lambda *_: False)
    settings = settings_of(tmp_path, speculation="lookup")
    first = make_drafting(settings, OPS, runs.append, "base")
    assert first is not None
    assert len(runs) > 40
    num_runs = len(runs)
    again = make_drafting(settings, OPS, runs.append, "base")
    assert again is not None
    assert again.costs.points == first.costs.points
    assert len(runs) == num_runs
    make_drafting(settings, OPS, runs.append, "another base")
    make_drafting(settings_of(tmp_path, speculation="lookup", threads=77), OPS, runs.append, "base")
    assert len(runs) == 3 * num_runs
    monkeypatch.setattr(speculation, "is_disturbed", lambda *_: True)
    make_drafting(settings, OPS, runs.append, "base")
    assert len(runs) == 4 * num_runs, "timed again"
    for costs in ([(1, 1e-12), (16, 5e-12)], [(1, 9e-13), (16, 1.0)]):  # the second time while other programs run
        monkeypatch.setattr(speculation, "measure", lambda _, costs=costs: StepCosts(costs))
        make_drafting(settings, OPS, runs.append, "base")
    monkeypatch.setattr(speculation, "is_disturbed", lambda *_: False)
    kept = make_drafting(settings, OPS, runs.append, "base")
    assert kept is not None
    assert kept.costs.points == [(1, 9e-13), (16, 5e-12)], "the shorter times are kept"


@pytest.mark.parametrize(("slower", "again"), [(1.0, False), (1.3, False), (1.5, True), (4.0, True)])
def test_costs_of_a_busy_machine_are_measured_again(slower: float, again: bool) -> None:
    timed = Timed()
    timed.runs.update(dict.fromkeys(range(50), 1))  # only the next step of each row count is slow: it allocates memory
    costs = StepCosts([(rows, slower * (10 + 3 * rows) / 1000) for rows in (1, 4, 16)])
    assert is_disturbed(costs, timed.run, timed.clock) is again


@pytest.mark.parametrize("busy", [1, 4])
def test_one_busy_row_count_is_enough(busy: int) -> None:
    timed = Timed()
    timed.runs.update(dict.fromkeys(range(50), 5))  # the disturbance is over
    costs = StepCosts([(rows, (2 if rows == busy else 1) * (10 + 3 * rows) / 1000) for rows in (1, 4, 16)])
    assert is_disturbed(costs, timed.run, timed.clock)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1, "seconds": [[1, 2]]}', '{"key": 1, "seconds": "x"}'])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    settings = settings_of(tmp_path, speculation="lookup")
    runs: list[int] = []
    make_drafting(settings, OPS, runs.append, "base")
    (file,) = (tmp_path / "step-costs").iterdir()
    file.write_text(content)
    num_runs = len(runs)
    assert make_drafting(settings, OPS, runs.append, "base") is not None
    assert len(runs) == 2 * num_runs
    assert json.loads(file.read_text())["seconds"]


def test_off_is_off_and_auto_drafts_on_a_cpu(tmp_path: Path) -> None:
    runs: list[int] = []
    assert make_drafting(settings_of(tmp_path, speculation="off"), OPS, runs.append, "base") is None
    assert make_drafting(settings_of(tmp_path, speculation="auto"), GPU, runs.append, "base") is None
    assert make_drafting(settings_of(tmp_path, speculation="lookup"), GPU, runs.append, "base") is not None
    assert runs == []
    assert make_drafting(settings_of(tmp_path, speculation="auto"), OPS, runs.append, "base") is not None


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "step-costs").write_text("a file in the directory's place")
    assert make_drafting(settings_of(tmp_path, speculation="lookup"), OPS, lambda rows: None, "base") is not None
