"""The trainer's process: its command line, start and stop, and the JSON object in its last line.

The trainer is `guanaco train`. Its environment has no key and no setting of the server, and it is offline. A trainer
that an earlier server left in a job's folder is ended before a new one starts there. Knows no states of jobs.
"""

import asyncio
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guanaco.server.training.jobs.limits import MAX_LOG_BYTES
from guanaco.server.training.jobs.progress import checkpoint_steps
from guanaco.server.training.jobs.records import Job

STOPPED = 130  # the exit code of a trainer that was told to stop and has written a checkpoint
_GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL
_MAX_ANSWER_BYTES = 64 << 10
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GUANACO_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class TrainerCommand:
    """The part of a trainer's command that does not depend on the job."""

    model: str | None = None  # as `--model` takes it; None: the demo
    threads: int = 1
    nice: int = 10
    learning_rate: float = 2e-4  # the rate that `learning_rate_multiplier` 1 means
    program: Sequence[str] = (sys.executable, "-m", "guanaco.server.commands.entry", "train")
    checker: Sequence[str] = (sys.executable, "-m", "guanaco.server.training.jobs.check")
    variables: Mapping[str, str] = field(default_factory=dict)  # the environment; no secrets

    def environment(self) -> dict[str, str]:
        """The whole environment of the process."""
        return {**self.variables, **_OFFLINE}

    def arguments(self, job: Job, data: Path, validation: Path | None, out: Path, work: Path) -> list[str]:
        """The command line for one job. It resumes if the work folder has a complete checkpoint."""
        chosen: dict[str, object] = {
            "--data": data,
            "--validation-data": validation,
            "--name": job.name,
            "--out": out,
            "--work": work,
            "--model": self.model,
            "--seed": job.seed,
            "--epochs": job.hyperparameters.n_epochs,
            "--batch-size": job.hyperparameters.batch_size,
            "--threads": self.threads,
        }
        if (multiplier := job.hyperparameters.learning_rate_multiplier) is not None:
            chosen["--learning-rate"] = f"{multiplier * self.learning_rate:.9g}"
        options = [text for name, value in chosen.items() if value is not None for text in (name, str(value))]
        return [*self.program, *options, "--json", *(["--resume"] if checkpoint_steps(work) else [])]


@dataclass(frozen=True)
class TrainerEnd:
    """How a trainer ended. answer: the JSON object in its last line of output; None if there is none."""

    code: int  # negative: killed by that signal
    answer: dict[str, Any] | None


class TrainerProcess:
    """One process in a job's folder. `start`, then `wait`; `stop` at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._killing: asyncio.TimerHandle | None = None
        self._is_told = False

    async def start(self, arguments: Sequence[str], command: TrainerCommand) -> None:
        """Start the trainer, after a trainer that an earlier server left in the folder has ended. Raises OSError."""
        await asyncio.to_thread(end_left_behind, self._folder)
        with (
            (self._folder / "stdout").open("wb") as out,
            (self._folder / "log.txt").open("ab") as log,
            (self._folder / "lock").open("wb", buffering=0) as lock,
        ):
            # The trainer inherits the lock, and holds it alone once this file is closed here.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                cwd=self._folder,
                env=command.environment(),
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
            lock.write(str(self._process.pid).encode())
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, command.nice)
        if self._is_told:
            self.stop()

    async def wait(self, seconds: float | None = None) -> TrainerEnd | None:
        """How the trainer ended; None if it still runs after `seconds` (None: wait without a limit)."""
        assert self._process is not None
        try:
            code = await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return None
        if self._killing is not None:
            self._killing.cancel()
        return TrainerEnd(code, last_answer(self._folder))

    def stop(self, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Ask the trainer to write a checkpoint and end. It is killed after `grace_seconds`. Returns at once."""
        self._is_told = True
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        if self._killing is None:
            self._killing = asyncio.get_running_loop().call_later(grace_seconds, self._kill)

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def trim_log(folder: Path) -> None:
    """Cut a log of more than MAX_LOG_BYTES to the last quarter of that. Its writer appends, so it is not disturbed."""
    path = folder / "log.txt"
    try:
        if path.stat().st_size <= MAX_LOG_BYTES:
            return
        with path.open("rb+") as file:
            file.seek(-(MAX_LOG_BYTES // 4), os.SEEK_END)
            kept = file.read(MAX_LOG_BYTES // 4)
            os.truncate(path, 0)
        with path.open("ab") as file:
            file.write(b"(what was written before was removed)\n" + kept)
    except OSError:
        return  # the disk is full, say: the job matters more than its log


def last_answer(folder: Path) -> dict[str, Any] | None:
    """The JSON object in the last line of a trainer's standard output."""
    try:
        with (folder / "stdout").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_ANSWER_BYTES))
            lines = file.read().split(b"\n")
        content = json.loads(next(line for line in reversed(lines) if line.strip()))
    except (OSError, ValueError, StopIteration):
        return None
    return content if isinstance(content, dict) else None


def end_left_behind(folder: Path, grace_seconds: float = _GRACE_SECONDS) -> None:
    """End the trainer that an earlier server started in this folder, if it still runs. Blocks until it is gone."""
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        since = time.monotonic()
        told: set[int] = set()
        while not _is_free(handle):
            number = signal.SIGKILL if time.monotonic() - since > grace_seconds else signal.SIGTERM
            text = os.pread(handle, 32, 0)
            # While the lock is held, the number in the file is the id of the process that holds it.
            if text.isdigit() and int(text) > 1 and number not in told:
                told.add(number)
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(int(text), number)
            time.sleep(0.02)
    finally:
        os.close(handle)


def _is_free(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
