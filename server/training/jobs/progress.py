"""What the trainer has measured so far: its list of logged steps, and the checkpoints that lie beside it.

The trainer writes `work/train.jsonl` (a JSON object for each logged step) and `work/checkpoint-N/`. After a resume it
may log steps again that it had logged before. Knows no job; `runner` asks every half second.
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

_TAIL_BYTES = 1 << 20  # of the list: the logged steps before a checkpoint, with an evaluation among them
_METRICS = ("train_loss", "valid_loss", "learning_rate", "tokens", "tokens_per_second")
_THEIR_NAMES = {"train_loss": "loss", "valid_loss": "eval_loss"}


class Follower:
    """Reads a list of logged steps as it grows, each part of it once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0  # up to here all lines were read

    def news(self, after_step: int) -> list[dict[str, Any]]:
        """What was logged since the last call, beyond a step, as of `measured`. A list that was written anew, which a
        resume does, is read from its beginning."""
        size = _whole_lines(self._path)
        if size < self._place:
            self._place = 0
        if size == self._place:
            return []
        found = list(measured(self._path, after_step, self._place))
        self._place = size
        return found


def tail(path: Path) -> list[dict[str, Any]]:
    """The last logged steps, as of `measured`: enough of them for a checkpoint."""
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
    """The logged steps beyond `after_step`, each once: `step`, `total_steps` (0: not said) and what was measured.

    offset: where to begin in the file; a line that is cut there is left out."""
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
    """All logged steps as a table with a line of names; empty where nothing was logged."""
    rows = list(measured(path))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *_METRICS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode() if rows else b""


def checkpoint_steps(work: Path) -> tuple[int, ...]:
    """The steps of the complete checkpoints in the trainer's folder, in order."""
    return tuple(sorted(step for step, path in checkpoints(work).items() if is_complete(path)))
