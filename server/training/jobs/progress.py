"""Reads what a trainer has measured so far: the steps that it logged, and its checkpoints.

The trainer writes `work/train.jsonl` (a JSON object for each logged step) and `work/checkpoint-N/`. After a resume it
may log steps that it had logged before. Knows no job; `runner` asks every half second.
"""

import csv
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guanaco.server.training.checkpoints import checkpoints, is_complete
from guanaco.server.training.jobs.disk import read_lines

_TAIL_BYTES = 1 << 20  # of the log's end: enough for the steps before a checkpoint, with an evaluation among them
_METRICS = ("train_loss", "valid_loss", "learning_rate", "tokens", "tokens_per_second")
_THEIR_NAMES = {"train_loss": "loss", "valid_loss": "eval_loss"}


class Follower:
    """Reads a log of steps while it grows, each part once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0  # up to here all lines were read

    def news(self, after_step: int) -> list[dict[str, Any]]:
        """The steps after `after_step` that were logged since the last call, in the form of `measured`. If the log has
        become shorter, because a resume wrote it anew, it is read from its beginning."""
        size = _whole_lines(self._path)
        if size < self._place:
            self._place = 0
        if size == self._place:
            return []
        found = list(measured(self._path, after_step, self._place))
        self._place = size
        return found


def tail(path: Path) -> list[dict[str, Any]]:
    """The last logged steps, in the form of `measured`. They reach back to an evaluation."""
    return list(measured(path, 0, max(0, _whole_lines(path) - _TAIL_BYTES)))


def _whole_lines(path: Path) -> int:
    """The size of a file up to the end of its last complete line."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - (64 << 10))
            file.seek(start)
            return start + file.read(size - start).rfind(b"\n") + 1
    except OSError:
        return 0


def measured(path: Path, after_step: int = 0, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The logged steps after `after_step`, each once: `step`, `total_steps` (0: unknown), and the _METRICS in its line.

    offset: the byte to begin at; a line that is cut there is left out."""
    for line in read_lines(path, offset):
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step <= after_step:
            continue
        after_step = step
        total = line.get("steps")
        found: dict[str, Any] = {"step": step, "total_steps": total if isinstance(total, int) else 0}
        for name in _METRICS:
            value = line.get(_THEIR_NAMES.get(name, name))
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                found[name] = value
        yield found


def as_csv(path: Path) -> bytes:
    """All logged steps as CSV with a line of names; empty if nothing was logged."""
    rows = list(measured(path))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *_METRICS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode() if rows else b""


def checkpoint_steps(work: Path) -> tuple[int, ...]:
    """The steps of the complete checkpoints in the trainer's folder, in order."""
    return tuple(sorted(step for step, path in checkpoints(work).items() if is_complete(path)))
