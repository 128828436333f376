"""Training over the API, as its routes call it: files, jobs, events and models of one API key, within its limits.

A method with an `Owner` sees only what that key has made, and raises RequestRefused if it refuses. Lives on the event
loop; disk work happens on threads. Knows no HTTP. Built by `server.bootstrap.training`.
"""

import asyncio
import fcntl
import importlib.util
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.extra import LIBRARIES
from guanaco.server.training.jobs.disk import make_directory, new_id
from guanaco.server.training.jobs.errors import RefusalKind, RequestRefused, job_not_found, storage_failed
from guanaco.server.training.jobs.files import FileStore, Upload
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.process import TrainerCommand
from guanaco.server.training.jobs.records import JOB, TRAINING, Hyperparameters, Job, Owner, Status, StoredFile
from guanaco.server.training.jobs.runner import JobRunner, Publisher
from guanaco.server.training.jobs.store import JobStore
from guanaco.server.training.jobs.usage import Usage

# A child process of a killed server keeps the lock until it has loaded its own program, which takes milliseconds.
_LOCK_TRIES, _LOCK_PAUSE_SECONDS = 20, 0.05


def has_extra() -> bool:
    """Whether the libraries of the `train` extra are installed. Imports none of them."""
    return all(importlib.util.find_spec(name) is not None for name in LIBRARIES)


@dataclass(frozen=True)
class JobRequest:
    """A job as a client asks for it. Every field is valid by itself."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class TrainingNumbers:
    """The numbers of one moment, for the metrics."""

    jobs: dict[str, int]  # status → number of jobs
    num_files: int
    num_file_bytes: int
    step: int = 0  # these three are of the running job; 0 if none runs
    steps: int = 0
    train_seconds: float = 0.0


class TrainingService:
    """All of training over the API for one server. `open` and `start` once, `close` at the end."""

    def __init__(
        self,
        directory: Path,
        limits: TrainLimits,
        command: TrainerCommand,
        *,
        is_available: bool | None = None,
        poll_seconds: float = 0.5,
    ) -> None:
        """is_available: whether jobs can run; None: whether the `train` extra is installed."""
        self.directory = directory
        self.limits = limits
        self.is_available = has_extra() if is_available is None else is_available
        self.files = FileStore(directory, limits)
        self.jobs = JobStore(directory, limits, self.files.remove_results)
        self._command = command
        self._usage = Usage(self.jobs, limits)
        self._poll_seconds = poll_seconds
        self._publisher: Publisher | None = None
        self._runner: JobRunner | None = None
        self._lock: int | None = None
        self._creating = asyncio.Lock()

    def open(self) -> tuple[str, ...]:
        """Lock the directory, and find the files and jobs of an earlier server. Returns remarks for the operator.

        Raises OSError, and BlockingIOError if another server uses the directory."""
        make_directory(self.directory)
        handle = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _take_lock(handle)
            self.files.open()
            notes = self.jobs.open()
        except BaseException:
            os.close(handle)
            raise
        self._lock = handle
        return notes

    def start(self, publisher: Publisher) -> None:
        """Begin to work on jobs. Call it on the event loop."""
        self._publisher = publisher
        self._runner = JobRunner(
            self.jobs, self.files, self._command, publisher, self.limits, poll_seconds=self._poll_seconds
        )
        if self.is_available:
            self._runner.start()

    def drain(self) -> None:
        """Prepare the server's end: the running job writes a checkpoint, and the next server resumes it."""
        if self._runner is not None:
            self._runner.drain()

    async def close(self) -> None:
        """As `drain`; then wait for the trainer's end, and unlock the directory."""
        if self._runner is not None:
            await self._runner.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def begin_upload(self, owner: Owner) -> Upload:
        return await asyncio.to_thread(self.files.begin, owner.digest)

    async def finish_upload(self, upload: Upload, filename: str) -> StoredFile:
        return await asyncio.to_thread(self.files.add, upload, filename)

    async def delete_file(self, owner: Owner, file_id: str) -> None:
        await asyncio.to_thread(self.files.delete, owner.digest, file_id, self.jobs.files_in_use())

    async def create(self, owner: Owner, wanted: JobRequest) -> Job:
        """Create a job and wake the runner, which checks its files first."""
        for name, param in ((wanted.training_file, "training_file"), (wanted.validation_file, "validation_file")):
            if name is not None and self.files.get(owner.digest, name, param).purpose != TRAINING:
                text = f"{param} names a file of results: upload one with the purpose {TRAINING}"
                raise RequestRefused(ErrorCode.INVALID_TRAINING_FILE, text, param)
        job_id = new_id(JOB)
        name = wanted.suffix or f"ft-{job_id.removeprefix(JOB + '-')[:12]}"
        self._check_name(owner, name)
        job = Job(
            id=job_id,
            owner=owner.digest,
            key_id=owner.key_id,
            created_at=int(time.time()),
            model=wanted.model,
            training_file=wanted.training_file,
            validation_file=wanted.validation_file,
            seed=secrets.randbelow(1 << 31) if wanted.seed is None else wanted.seed,
            name=name,
            suffix=wanted.suffix,
            hyperparameters=wanted.hyperparameters,
            metadata=wanted.metadata or {},
        )
        async with self._creating:  # no other request comes between the count of jobs and the new one
            self._usage.check_new(owner.digest)
            try:
                await asyncio.to_thread(self.jobs.add, job)
                await asyncio.to_thread(self.jobs.note, job.id, "The job was created; its files are checked.")
            except OSError as error:
                raise storage_failed(error) from None
        if self._runner is not None:
            self._runner.wake()
        return job

    def job(self, owner: Owner, job_id: str) -> Job:
        """One job of a key."""
        job = self.jobs.get(job_id)
        if job is None or job.owner != owner.digest:
            raise job_not_found()
        return job

    async def cancel(self, owner: Owner, job_id: str) -> Job:
        """Cancel a job. A job that is being published or has ended can't be cancelled."""
        job = self.job(owner, job_id)
        if job.is_publishing and not job.status.is_final:
            text = "the job's adapter is being published: wait a moment, then delete the model if it is not wanted"
            raise RequestRefused(ErrorCode.JOB_NOT_CANCELLABLE, text, None, RefusalKind.CONFLICT)
        if job.status.is_final:
            text = f"the job has ended already: it is {job.status}"
            raise RequestRefused(ErrorCode.JOB_NOT_CANCELLABLE, text, None, RefusalKind.CONFLICT)
        try:
            cancelled = await asyncio.to_thread(self.jobs.cancel, job_id, int(time.time()))
            if cancelled is None:  # its state has just changed: the checks above then raise the right error
                return await self.cancel(owner, job_id)
            if self._runner is not None:
                self._runner.stop_if_running(job_id)
            await asyncio.to_thread(self.jobs.note, job_id, "The job was cancelled.")
        except OSError as error:
            raise storage_failed(error) from None
        return cancelled

    async def events(self, owner: Owner, job_id: str, after: str | None, limit: int) -> list[dict[str, Any]]:
        """At most `limit` of a job's events, the latest first. after: the id of an event; only older ones are returned.

        Raises LookupError if the job has no event of that id."""
        return await asyncio.to_thread(self.jobs.events, self.job(owner, job_id).id, after, limit)

    async def delete_model(self, owner: Owner, name: str) -> bool:
        """Remove a model that a job of this key made. False if the key has none of that name."""
        try:
            return self._publisher is not None and await self._publisher.unload(owner.digest, name)
        except AdapterError:
            return False

    def numbers(self) -> TrainingNumbers:
        """The numbers of this moment, for the metrics."""
        jobs = self.jobs.all()
        num_files, num_bytes = self.files.totals()
        counts = {status.value: sum(job.status is status for job in jobs) for status in Status}
        running = next((job for job in jobs if job.status is Status.RUNNING), None)
        if running is None:
            return TrainingNumbers(counts, num_files, num_bytes)
        return TrainingNumbers(counts, num_files, num_bytes, running.step, running.steps, running.train_seconds)

    def _check_name(self, owner: Owner, name: str) -> None:
        if self._publisher is None:
            return
        try:
            free = self._publisher.may_have(owner.digest, name)
        except AdapterError as error:
            text = "suffix must be 1 to 64 letters, digits, `.`, `_` and `-`, and start with a letter or digit"
            raise RequestRefused(error.code, text, "suffix") from None
        if not free:
            text = "a model that no job of this API key made has this name already: choose another suffix"
            raise RequestRefused(ErrorCode.NAME_TAKEN, text, "suffix", RefusalKind.CONFLICT)


def _take_lock(handle: int) -> None:
    """Lock an open file for this server. Raises BlockingIOError if another server still has it after a second."""
    for left in reversed(range(_LOCK_TRIES)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if left == 0:
                raise
            time.sleep(_LOCK_PAUSE_SECONDS)
