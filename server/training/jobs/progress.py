"""What the trainer has measured so far: its list of logged steps, and the checkpoints that lie beside it.

The trainer writes `work/train.jsonl` (a JSON object for each logged step) and `work/checkpoint-N/`. After a resume it
may log steps again that it had logged before. Knows no job; `runner` asks every half second.
"""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guanaco.server.training.checkpoints import checkpoints, is_complete
from guanaco.server.training.jobs.disk import read_lines

_METRICS = ("train_loss", "valid_loss", "learning_rate", "tokens", "tokens_per_second")
_THEIR_NAMES = {"train_loss": "loss", "valid_loss": "eval_loss"}


def measured(path: Path, after_step: int = 0) -> Iterator[dict[str, Any]]:
    """The logged steps beyond `after_step`, each once: `step`, `total_steps` (0: not said) and what was measured."""
    for line in read_lines(path):
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
