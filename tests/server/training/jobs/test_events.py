"""The events of a job, read from their end; what a trainer logs, read as it grows; and a log that stays small."""

import json
from pathlib import Path

import pytest

from guanaco.server.training.jobs import events, process
from guanaco.server.training.jobs.disk import append_line
from guanaco.server.training.jobs.events import EventList
from guanaco.server.training.jobs.process import trim_log
from guanaco.server.training.jobs.progress import Follower, tail


@pytest.mark.parametrize("block", [1, 50, 1 << 16])
def test_pages_of_events_are_the_list(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_BLOCK_BYTES", block)
    path = tmp_path / "events.jsonl"
    append_line(path, {"id": "ftevent-" + "f" * 24, "message": "of an earlier version"})
    made = EventList(path)
    for number in range(7):
        made.add(f"ä {number}")
        if number == 3:
            with path.open("ab") as file:
                file.write(b'{"id": "cut by a cr')
    messages = [event["message"] for event in made.latest(None, 100)]
    assert messages == [*(f"ä {number}" for number in range(6, -1, -1)), "of an earlier version"]
    found, after = [], None
    while page := made.latest(after, 3):
        found += [event["message"] for event in page]
        after = page[-1]["id"]
    assert found == messages
    assert after == "ftevent-" + "f" * 24
    assert len({event["id"] for event in made.latest(None, 100)}) == 8
    for unknown in ("ftevent-" + "0" * 24, "ftevent-x", "", "../x"):
        with pytest.raises(LookupError):
            made.latest(unknown, 3)
    assert EventList(tmp_path / "absent").latest(None, 3) == []


def test_a_page_reads_a_small_part_of_a_long_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, taken = EventList(tmp_path / "events.jsonl"), []
    monkeypatch.setattr("guanaco.server.training.jobs.disk.os.fsync", lambda _: None)
    for number in range(3000):
        made.add(f"Step {number}")
    parse = events._object
    monkeypatch.setattr(events, "_object", lambda line: taken.append(line) or parse(line))
    last = made.latest(None, 21)[-1]["id"]
    assert [event["message"] for event in made.latest(last, 2)] == ["Step 2978", "Step 2977"]
    assert len(taken) < 40


def test_a_list_that_grows_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "train.jsonl", []
    follower = Follower(path)
    assert follower.news(0) == []

    def log(*steps: int) -> str:
        return "".join(json.dumps({"step": step, "steps": 9, "loss": 1.0 / step}) + "\n" for step in steps)

    from guanaco.server.training.jobs import progress

    lines = progress.read_lines
    monkeypatch.setattr(progress, "read_lines", lambda *given: read.append(given[1]) or lines(*given))
    path.write_text(log(1, 2) + '{"step": 3, "st')
    assert [line["step"] for line in follower.news(0)] == [1, 2]
    path.write_text(log(1, 2, 3, 4))
    assert [line["step"] for line in follower.news(2)] == [3, 4]
    assert follower.news(4) == []
    assert read == [0, len(log(1, 2))]
    path.write_text(log(1, 2))  # a resume has forgotten two steps
    assert follower.news(4) == []
    path.write_text(log(1, 2, 3, 4, 5))
    assert [line["step"] for line in follower.news(4)] == [5]
    monkeypatch.setattr(progress, "_TAIL_BYTES", 60)
    assert [line["step"] for line in tail(path)] == [5]


def test_a_log_that_grows_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG_BYTES", 4000)
    trim_log(tmp_path)
    path = tmp_path / "log.txt"
    with path.open("ab") as writer:
        for number in range(500):
            writer.write(b"%07d warning\n" % number)
        writer.flush()
        trim_log(tmp_path)
        assert path.stat().st_size < 1100
        writer.write(b"and on it goes\n")
    lines = path.read_text().splitlines()
    assert lines[0] == "(what was written before was removed)"
    assert lines[-2:] == ["0000499 warning", "and on it goes"]
