"""Moves jobs through their states: validating → queued → running → succeeded, failed or cancelled; one trains at once.

    validating   a process reads the files and counts their rows
    queued       waits for its turn, the oldest first
    running      the trainer works; then `is_publishing`: the adapter is checked, tried out and published
A job that runs when the server ends stays "running" on the disk, and the next server goes on with it. Lives on the
event loop; disk work happens on threads. Knows no HTTP.
"""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.server.training.jobs.disk import new_id
from guanaco.server.training.jobs.errors import RequestRefused, without_paths
from guanaco.server.training.jobs.files import FileStore
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.process import (
    STOPPED,
    TrainerCommand,
    TrainerEnd,
    TrainerProcess,
    last_answer,
    trim_log,
)
from guanaco.server.training.jobs.progress import Follower, as_csv, checkpoint_steps, tail
from guanaco.server.training.jobs.records import CHECKPOINT, FILE, Checkpoint, Job, Status
from guanaco.server.training.jobs.store import JobStore
from guanaco.server.training.jobs.usage import Usage
from guanaco.server.training.jobs.validation import check_files

logger = logging.getLogger("guanaco.training")

_POLL_SECONDS = 0.5
_SAVE_SECONDS = 5.0  # the training time of a running job is written at least this often
_MAX_IDLE_STARTS = 3  # starts in a row in which the trainer ends without an answer and without a step
_RETRY_SECONDS = 5.0  # pause if not even a job's failure can be written


class Publisher(Protocol):
    """Lets the server answer with trained adapters. `publisher.py` implements it. owner: digest of an API key."""

    async def version(self, job: Job) -> str:
        """The adapter's content digest. Raises PublishError."""

    async def publish(self, job: Job) -> str:
        """Check, try out and publish the adapter of a job. Returns its name. Raises PublishError."""

    def may_have(self, owner: str, name: str) -> bool:
        """Whether a job of this key may take a name now. Raises AdapterError for a name that no adapter may have."""

    async def unload(self, owner: str, name: str) -> bool:
        """Remove a model that a job of this key made. False if there is none of that name. Raises AdapterError."""


class PublishError(GuanacoError):
    """A trained adapter that can't be served. The message is for the client."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class JobRunner:
    """The queue of one server. `start` and `close` once; `wake` after every new job."""

    def __init__(
        self,
        jobs: JobStore,
        files: FileStore,
        command: TrainerCommand,
        publisher: Publisher,
        limits: TrainLimits,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._jobs = jobs
        self._files = files
        self._command = command
        self._publisher = publisher
        self._usage = Usage(jobs, limits)
        self._poll_seconds = poll_seconds
        self._woken = {Status.VALIDATING: asyncio.Event(), Status.QUEUED: asyncio.Event()}
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self._process: TrainerProcess | None = None
        self._current: str | None = None  # the job that trains
        self._checks: dict[str, asyncio.Task[int]] = {}  # job id → the check of its files
        self._is_stopping = False

    def start(self) -> None:
        """Begin to work, first on the jobs that an earlier server left. Call it on the event loop."""
        self._tasks = (
            asyncio.create_task(self._work(Status.VALIDATING, self._validate)),
            asyncio.create_task(self._work(Status.QUEUED, self._train)),
        )

    def wake(self) -> None:
        """Let the queue look at the jobs again, after a job was added or changed."""
        for event in self._woken.values():
            event.set()

    def drain(self) -> None:
        """Begin nothing new, and tell the trainer to write a checkpoint and end. The next server resumes its job."""
        self._is_stopping = True
        if self._process is not None:
            self._process.stop()

    async def close(self) -> None:
        """As `drain`; then wait for the trainer's end."""
        self.drain()
        self.wake()
        for check in self._checks.values():
            check.cancel()
        for task in self._tasks[1:] if self._process is None else ():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop_if_running(self, job_id: str) -> None:
        """Stop the work for a cancelled job: end the check of its files, and tell its trainer to end after its step."""
        if (check := self._checks.get(job_id)) is not None:
            check.cancel()
        if self._current == job_id and self._process is not None:
            self._process.stop()

    async def _work(self, status: Status, move: Any) -> None:
        """Process the jobs of one state, one after the other."""
        while not self._is_stopping:
            self._woken[status].clear()
            waiting = [Status.RUNNING, Status.QUEUED] if status is Status.QUEUED else [status]
            # A job in the state running was interrupted by a restart, and goes first.
            job = next((job for each in waiting for job in self._jobs.in_status(each)), None)
            if job is None:
                await self._woken[status].wait()
                continue
            try:
                await move(job)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.exception("fine-tuning job %s: unforeseen error in state %s", job.id, job.status)
                await self._give_up(job, error)

    async def _give_up(self, job: Job, error: Exception) -> None:
        """Fail a job after an internal error of the server, so that the other jobs go on."""
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        try:
            await self._fail(job, ErrorCode.INTERNAL_ERROR, f"the server failed over this job{reason}; its log has why")
        except OSError:  # not even that can be written: the disk is full or gone
            await asyncio.sleep(_RETRY_SECONDS)

    async def _validate(self, job: Job) -> None:
        try:
            paths = [self._files.path(self._files.get(job.owner, name)) for name in job.files]
            check = asyncio.create_task(check_files(self._command, paths, self._jobs.folder(job.id)))
            self._checks[job.id] = check
            await asyncio.wait([check])
            if check.cancelled():  # the job was cancelled, or the server ends
                return
            num_rows = check.result()
            self._usage.check_planned(job, num_rows)
        except RequestRefused as error:
            await self._fail(job, error.code, error.message, error.param)
            return
        finally:
            self._checks.pop(job.id, None)
        if self._jobs.get(job.id) is not job:  # cancelled meanwhile
            return
        await self._change(job.id, status=Status.QUEUED, num_rows=num_rows)
        await self._note(job.id, f"Files validated: {num_rows} conversations. The job waits for its turn.")
        self.wake()

    async def _train(self, job: Job) -> None:
        self._current = job.id
        try:
            if not job.is_publishing and not await self._trained(job):
                return
            await self._publish(job.id)
        finally:
            self._process = None
            ended = self._jobs.get(job.id)
            if ended is not None and ended.status.is_final:
                await self._clean(ended)
            self._current = None

    async def _trained(self, job: Job) -> bool:
        """Run the trainer to its end. Returns whether there is an adapter to publish."""
        out, folder = self._jobs.adapter(job.id), self._jobs.folder(job.id)
        if job.status is Status.RUNNING and out.is_dir() and "adapter" in (last_answer(folder) or {}):
            return await self._ended(job, TrainerEnd(0, last_answer(folder)))  # the trainer ended while no server ran
        paths = [self._files.path(self._files.get(job.owner, name)) for name in job.files]
        validation = paths[1] if len(paths) > 1 else None
        is_again = job.status is Status.RUNNING
        arguments = self._command.arguments(job, paths[0], validation, out, folder / "work")
        job = await self._change(
            job.id,
            status=Status.RUNNING,
            started_at=job.started_at or int(time.time()),
            num_idle_starts=job.num_idle_starts + 1,
        )
        if job.status.is_final:
            return False
        await self._note(job.id, "The job goes on where it was interrupted." if is_again else "The job has started.")
        logger.info("fine-tuning job %s %s", job.id, "resumes" if is_again else "starts")
        self._process = process = TrainerProcess(folder)
        current = self._jobs.get(job.id)
        if self._is_stopping or current is None or current.status.is_final:
            return False
        await process.start(arguments, self._command)
        try:
            end = await self._watch(job, process, folder / "work")
        except BaseException:  # the disk failed, say: no trainer may go on unwatched beside the next one
            process.stop()
            await process.wait()
            raise
        return await self._ended(self._jobs.get(job.id) or job, end)

    async def _watch(self, job: Job, process: TrainerProcess, work: Path) -> TrainerEnd:
        """Record the trainer's progress until it ends. A job that exceeds its key's limits fails."""
        begun, before = time.monotonic(), job.train_seconds
        saved, end, follower = begun, None, Follower(work / "train.jsonl")
        while end is None:
            end = await process.wait(self._poll_seconds)
            seconds = before + time.monotonic() - begun
            await asyncio.to_thread(trim_log, work.parent)
            is_news = await self._note_progress(job.id, work, follower)
            if is_news or end is not None or time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                current = await self._change(job.id, train_seconds=seconds)
                if end is None and (problem := self._usage.spent(current)) is not None:
                    await self._fail(current, ErrorCode.TRAINING_QUOTA_EXCEEDED, problem)
                    process.stop()
        return end

    async def _note_progress(self, job_id: str, work: Path, follower: Follower) -> bool:
        """Make events of new steps, and records of new checkpoints. Returns whether there was anything new."""
        job = self._jobs.get(job_id)
        if job is None or job.status.is_final:
            return False
        news = await asyncio.to_thread(follower.news, job.step)
        steps = await asyncio.to_thread(checkpoint_steps, work)
        for line in news:
            step, total = line["step"], line["total_steps"]
            shown = f"Step {step}/{total}" if total else f"Step {step}"
            loss = f": training loss {line['train_loss']:.4f}" if "train_loss" in line else ""
            await self._note(job_id, shown + loss, data=line)
        changes: dict[str, Any] = {}
        if news:
            last = news[-1]
            total = last["total_steps"] or job.steps
            spent = max(1.0, time.time() - (job.started_at or time.time()))
            left = spent / last["step"] * max(0, total - last["step"])
            changes = {"step": last["step"], "steps": total, "num_idle_starts": 0}
            changes["estimated_finish"] = int(time.time() + left) if total else None
        known = {checkpoint.step for checkpoint in job.checkpoints}
        if new := [step for step in steps if step not in known]:
            lines = await asyncio.to_thread(tail, work / "train.jsonl")
            made = tuple(_checkpoint(step, lines) for step in new)
            changes["checkpoints"] = (*job.checkpoints, *made)
        if changes:
            await self._change(job_id, **changes)
        return bool(changes)

    async def _ended(self, job: Job, end: TrainerEnd) -> bool:
        """Handle the trainer's end. Returns whether there is an adapter to publish."""
        answer = end.answer or {}
        if job.status.is_final:
            return False
        if end.code == 0 and "adapter" in answer and self._jobs.adapter(job.id).is_dir():
            tokens, steps = answer.get("trained_tokens"), answer.get("steps")
            await self._change(
                job.id,
                is_publishing=True,
                trained_tokens=tokens if isinstance(tokens, int) else None,
                step=steps if isinstance(steps, int) else job.step,
                steps=steps if isinstance(steps, int) else job.steps,
            )
            await self._note(job.id, "The training is complete; the adapter is checked and tried out.")
            return True
        if isinstance(error := answer.get("error"), dict):
            known = [
                str(path) for path in (self._jobs.folder(job.id), self._jobs.adapters, self._command.model) if path
            ]
            message = without_paths(str(error.get("message") or "the training failed"), known)
            param = error.get("param")
            await self._fail(job, str(error.get("code") or ErrorCode.TRAINING_FAILED), message, param)
        elif self._is_stopping:  # it stays "running": the next server goes on
            await self._change(job.id, num_idle_starts=max(0, job.num_idle_starts - 1))
        elif job.num_idle_starts >= _MAX_IDLE_STARTS:
            how = f"was ended by signal {-end.code}" if end.code < 0 else f"ended with code {end.code}"
            hint = " (memory may be short)" if end.code == -9 else ""
            text = f"the training process {how}{hint} {job.num_idle_starts} times without a step; the log has why"
            await self._fail(job, ErrorCode.TRAINING_FAILED, text)
        elif end.code != STOPPED:
            await self._note(job.id, "The training process ended early; it is started again.", level="warn")
        return False

    async def _publish(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        assert job is not None
        if job.status.is_final:
            return
        try:
            # Recorded before publishing: after a crash this version must be known as this key's.
            job = await self._change(job_id, version=await self._publisher.version(job))
            if job.status.is_final:
                return
            name = await self._publisher.publish(job)
        except PublishError as error:
            await self._fail(job, ErrorCode.PUBLISH_FAILED, error.message)
            return
        if name != job.name:
            text = f"The name {job.name} was taken while the job ran, so that the model is called {name}."
            await self._note(job_id, text, level="warn")
        results = await self._results(job)
        now = int(time.time())
        # The event goes first: a client that has seen the last state need not ask for events again.
        await self._note(job_id, f"The job succeeded: the model {name} answers now.")
        await self._change(
            job_id, status=Status.SUCCEEDED, fine_tuned_model=name, finished_at=now, result_files=results
        )
        logger.info("fine-tuning job %s succeeded", job_id)

    async def _results(self, job: Job) -> tuple[str, ...]:
        """Write the metrics as a file of the job's key. Returns its id in a tuple; empty if nothing was logged or the
        disk failed."""
        content = await asyncio.to_thread(as_csv, self._jobs.folder(job.id) / "work" / "train.jsonl")
        if not content:
            return ()
        file_id = FILE + job.id.removeprefix("ftjob")  # the same after a crash
        with suppress(OSError):
            await asyncio.to_thread(self._files.add_result, job.owner, "step_metrics.csv", content, file_id)
            return (file_id,)
        return ()

    async def _clean(self, job: Job) -> None:
        """Keep the results of a finished job, and remove its work files."""
        if job.status is not Status.SUCCEEDED and not job.result_files and (results := await self._results(job)):
            with suppress(OSError):
                await self._change(job.id, result_files=results)
        await asyncio.to_thread(self._jobs.clear_work, job)

    async def _fail(self, job: Job, code: str, message: str, param: Any = None) -> None:
        current = self._jobs.get(job.id)
        if current is None or current.status.is_final:
            return
        error = {"code": str(code), "message": message, "param": param if isinstance(param, str) else None}
        with suppress(OSError):
            await self._note(job.id, f"The job failed: {message}", level="error")
        await self._change(job.id, status=Status.FAILED, error=error, finished_at=int(time.time()))
        logger.warning("fine-tuning job %s failed: %s", job.id, code)

    async def _change(self, job_id: str, **changes: Any) -> Job:
        return await asyncio.to_thread(self._jobs.change, job_id, **changes)

    async def _note(self, job_id: str, message: str, *, level: str = "info", data: Any = None) -> None:
        await asyncio.to_thread(self._jobs.note, job_id, message, level=level, data=data)


def _checkpoint(step: int, lines: list[dict[str, Any]]) -> Checkpoint:
    """The record of a checkpoint at `step`, with the last losses that were logged up to it."""
    before = [line for line in lines if line["step"] <= step]
    train = next((line["train_loss"] for line in reversed(before) if "train_loss" in line), None)
    valid = next((line["valid_loss"] for line in reversed(before) if "valid_loss" in line), None)
    return Checkpoint(new_id(CHECKPOINT), step, int(time.time()), train, valid)
