"""The log and the progress of a running training, and its early ends: `train.jsonl`, patience, signals.

`train.jsonl` has one JSON object for each step: step, steps, loss, eval_loss (if it was evaluated then), learning_rate,
grad_norm, tokens (all that were read so far), tokens_per_second (of this process, without evaluations) and time
(seconds since the epoch). Used by `job`.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

LOG_NAME = "train.jsonl"


class StopSignal:
    """Whether Ctrl-C or SIGTERM has come."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the `with` block the first signal only sets `came`, and the second raises KeyboardInterrupt."""

        def remember(_number: int, _frame: Any) -> None:
            if self.came:
                raise KeyboardInterrupt
            self.came = True

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Watcher(transformers.TrainerCallback):
    """Writes the log, reports progress, and stops the training early or after a signal."""

    def __init__(
        self,
        log: Path,
        tokens_after: Sequence[int],
        stop: StopSignal,
        patience: int,
        report: Callable[[str, int, int], None],
    ) -> None:
        """tokens_after: tokens that have been read after step 0, 1, … report: gets (text, step, number of steps)."""
        self._log = log
        self._tokens_after = tokens_after
        self._stop = stop
        self._patience = patience
        self._report = report
        self._line: dict[str, Any] | None = None  # the last step's; written when no evaluation can follow any more
        self._began = 0.0
        self._first_step = 0
        self.seconds = 0.0  # spent in steps by this process
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the log's lines of steps that the resumed training makes again."""
        self._first_step = state.global_step
        kept = [line for line in read_log(self._log) if line["step"] <= state.global_step]
        self._log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the line of the step before, and begin to time this one."""
        self._flush()
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop timing the step. After a signal, end the training with a checkpoint."""
        self.seconds += time.monotonic() - self._began
        tokens = self._tokens_after[state.global_step] - self._tokens_after[self._first_step]
        self.tokens_per_second = tokens / max(self.seconds, 1e-9)
        self._obey(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the figures of a step, or add those of an evaluation after it."""
        logs = logs or {}
        if "loss" in logs:
            self._line = {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": self._tokens_after[state.global_step],
                "tokens_per_second": round(self.tokens_per_second, 2),
                "time": round(time.time(), 3),
            }
        if "eval_loss" in logs and self._line is not None:
            self._line["eval_loss"] = logs["eval_loss"]
        if self._line is not None:
            self._report(_shown(self._line, state), state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the held-out loss has not improved for `patience` evaluations. Only the state is read, which a
        checkpoint keeps, so a resumed training stops at the same step."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if self._patience and len(losses) - 1 - losses.index(min(losses)) >= self._patience:
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last line, so that the log has every step that the checkpoint has."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last line."""
        self._flush()

    def _obey(self, control: Any) -> None:
        if self._stop.came:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _flush(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _shown(line: dict[str, Any], state: Any) -> str:
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    held_out = f" held-out {losses[-1]:.3f}" if losses else ""
    return f"loss {line['loss']:.3f}{held_out} {line['tokens_per_second']:.0f} tok/s"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects in a `train.jsonl`. Lines that can't be read, such as a last one that was cut off, are left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
