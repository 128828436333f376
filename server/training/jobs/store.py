"""The jobs of one server on disk: for each a record, a list of events, and the folders of its trainer.

    jobs/ftjob-…/job.json, events.jsonl      the record, replaced as a whole; the events, line by line
    jobs/ftjob-…/work, stdout, log.txt       the trainer's checkpoints and metrics, its answer, its messages
    adapters/ftjob-…                         the trained adapter

Every change is written to disk before it counts. Knows no queue and no process; `runner` moves the jobs.
"""

import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any

from guanaco.server.training.jobs.disk import is_id, make_directory, read_json
from guanaco.server.training.jobs.disk import write_json as write_record
from guanaco.server.training.jobs.events import EventList
from guanaco.server.training.jobs.limits import WINDOW_SECONDS, TrainLimits
from guanaco.server.training.jobs.records import JOB, Job, Status


class JobStore:
    """The jobs below one directory. Methods may be called from any thread."""

    def __init__(
        self,
        directory: Path,
        limits: TrainLimits,
        forget_results: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> None:
        """forget_results: removes the result files of a job that is forgotten, by their ids."""
        self._limits = limits
        self._forget_results = forget_results
        self._directory = directory / "jobs"
        self.adapters = directory / "adapters"
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}

    def open(self) -> tuple[str, ...]:
        """Find the jobs of an earlier server. Returns remarks for the operator. Raises OSError."""
        make_directory(self._directory)
        make_directory(self.adapters)
        notes = []
        for path in sorted(self._directory.iterdir()):
            if not is_id(path.name, JOB):
                continue
            try:
                job = Job.restored(read_json(path / "job.json") or {})
            except (TypeError, ValueError, KeyError):
                if (path / "job.json").exists():
                    notes.append(f"fine-tuning job {path.name}: its record is damaged, so that it is left out")
                else:
                    shutil.rmtree(path, ignore_errors=True)  # a crash came before the client got this job
                continue
            self._jobs[job.id] = job
            if job.status.is_final:
                self.clear_work(job)
        return tuple(notes)

    def add(self, job: Job) -> None:
        """Keep a new job, and forget old ones of its key. Raises OSError; then the job is not kept."""
        try:
            make_directory(self.folder(job.id))
            write_record(self.folder(job.id) / "job.json", job.saved())
        except OSError:
            shutil.rmtree(self.folder(job.id), ignore_errors=True)
            raise
        with self._lock:
            self._jobs[job.id] = job
        self._forget_old(job.owner)

    def change(self, job_id: str, **changes: Any) -> Job:
        """Change a job's record, and return it. Of a job that has ended, only `result_files` can still change. Raises
        OSError; then nothing changed."""
        with self._lock:
            job = self._jobs[job_id]
            if job.status.is_final and "result_files" not in changes:
                return job
            changed = replace(job, **changes)
            write_record(self.folder(job_id) / "job.json", changed.saved())
            self._jobs[job_id] = changed
            return changed

    def cancel(self, job_id: str, now: int) -> Job | None:
        """End a job as cancelled; None if it has already ended or is being published. Raises OSError."""
        with self._lock:
            job = self._jobs[job_id]
            if job.status.is_final or job.is_publishing:
                return None
            return self.change(job_id, status=Status.CANCELLED, finished_at=now)

    def note(self, job_id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Add an event to a job's list. Raises OSError."""
        with self._lock:
            self._events(job_id).add(message, level=level, data=data)

    def events(self, job_id: str, after: str | None = None, limit: int = 1 << 30) -> list[dict[str, Any]]:
        """At most `limit` of a job's events, the latest first. after: the id of an event; only older ones are returned.

        Raises LookupError if the job has no event of that id."""
        return self._events(job_id).latest(after, limit)

    def _events(self, job_id: str) -> EventList:
        return EventList(self.folder(job_id) / "events.jsonl")

    def get(self, job_id: str) -> Job | None:
        """The job with this id; None if there is none."""
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        """All jobs, the oldest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: (job.created_at, job.id))

    def of(self, owner: str) -> list[Job]:
        """A key's jobs, the oldest first."""
        return [job for job in self.all() if job.owner == owner]

    def in_status(self, *statuses: Status) -> list[Job]:
        """The jobs in one of these states, the oldest first."""
        return [job for job in self.all() if job.status in statuses]

    def folder(self, job_id: str) -> Path:
        """The folder of a job."""
        assert is_id(job_id, JOB)
        return self._directory / job_id

    def adapter(self, job_id: str) -> Path:
        """The path of a job's adapter."""
        assert is_id(job_id, JOB)
        return self.adapters / job_id

    def files_in_use(self) -> tuple[str, ...]:
        """The ids of the files that unfinished jobs read."""
        return tuple(name for job in self.all() if not job.status.is_final for name in job.files)

    def clear_work(self, job: Job) -> None:
        """Remove the work folder of a finished job, and its adapter unless that may have been published."""
        shutil.rmtree(self.folder(job.id) / "work", ignore_errors=True)
        if job.status is Status.CANCELLED or (job.status is Status.FAILED and not job.is_publishing):
            shutil.rmtree(self.adapter(job.id), ignore_errors=True)

    def versions(self, owner: str, name: str) -> frozenset[str]:
        """The adapter versions that jobs of a key have published, or are about to publish, under a name."""
        return frozenset(
            job.version for job in self.of(owner) if job.version and name in (job.fine_tuned_model, job.name)
        )

    def _forget_old(self, owner: str) -> None:
        """Forget a key's oldest finished jobs beyond the limit. A job that still counts in the key's quota stays, since
        many jobs that fail at once must not reset the quota."""
        since = time() - WINDOW_SECONDS
        old = [job for job in self.of(owner) if job.status.is_final][: -self._limits.max_kept_jobs_per_key]
        self._remove(
            job for job in old if not (job.step or job.train_seconds) or (job.finished_at or job.created_at) < since
        )

    def _remove(self, jobs: Iterable[Job]) -> None:
        """Forget jobs, with their result files. The adapter of a job that succeeded stays, because the server may still
        load it from there."""
        for job in jobs:
            with self._lock:
                self._jobs.pop(job.id, None)
            if job.status is not Status.SUCCEEDED:
                shutil.rmtree(self.adapter(job.id), ignore_errors=True)
            self._forget_results(job.result_files)
            shutil.rmtree(self.folder(job.id), ignore_errors=True)
