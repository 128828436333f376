"""The engine: schedule, run, update, once per step. Synchronous; a thread drives it (`async_engine`), or a loop.

What fails in a step is narrowed down to the requests at fault, so that one bad request is not everybody's error.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.request import (
    Abort,
    AddVersion,
    ForgetVersion,
    Message,
    ReadDone,
    Request,
    SampledToken,
    ScheduledBatch,
    StepOutput,
    StepStats,
    Submit,
)
from guanaco.server.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

# A request ends with the first where the forward pass could not compute it, with the second where its adapter could not
# be put on the device.
_COMPUTE_ERRORS = (ErrorCode.INTERNAL_ERROR, ErrorCode.ADAPTER_LOAD_FAILED)


class EngineFailure(GuanacoError):
    """The engine cannot compute any more; the process should end and be started again."""


class Runner(Protocol):
    """What computes a step: `model_runner.ModelRunner`, or a fake one in the tests."""

    def load_adapter(self, slot: int, version: str) -> None:
        """Put an adapter version into an adapter slot."""

    def clear_adapter(self, slot: int) -> None:
        """Empty an adapter slot, which no sequence uses."""

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        """Compute the batch: one result for each of its sequences. Running the same batch again must be harmless.

        `begin` is called when the forward pass begins: for a while, Python is free for other threads.
        """

    def probe(self) -> None:
        """Compute something that always works, and raise if it doesn't."""


class AdapterSource(Protocol):
    """Where adapters that are not in host memory come from: `server.adapters.tiers`, or a made-up one."""

    def start(self, version: str) -> None:
        """Begin to read a version; `ReadDone` follows when it is in host memory, or cannot be had."""

    def drop(self, version: str) -> None:
        """Let the host copy of a version go."""

    def gone(self, version: str) -> None:
        """A version that was to be forgotten is: it is neither on the device nor in host memory, nor being read."""


class Engine:
    """Messages in, one StepOutput per step out. Not thread-safe: one thread calls both."""

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Callable[[], float] = awake_seconds) -> None:
        self.scheduler = scheduler
        self.source: AdapterSource | None = None  # none: all adapters stay in memory
        self.on_forward: Callable[[], None] = lambda: None  # called when a step's forward pass begins
        self._runner = runner
        self._clock = clock
        self._leaving: dict[str, None] = {}  # versions to forget as soon as nobody holds them

    @property
    def has_work(self) -> bool:
        left = self.seconds_left
        return self.scheduler.has_work or (left is not None and left < 0)

    @property
    def seconds_left(self) -> float | None:
        """How long an engine without work may be left alone: until somebody has waited too long for an adapter."""
        return self.scheduler.loading.seconds_left(self._clock())

    def handle(self, *messages: Message) -> tuple[bool, ...]:
        """Take messages in, in order; then adapters move as far as there is room.

        Returns an answer for each: False for an AddVersion that host memory or the device has no room for. Raises
        ValueError for a request that could never fit.
        """
        answers = tuple(self._handle(message) for message in messages)
        self._settle()
        return answers

    def _handle(self, message: Message) -> bool:
        match message:
            case Submit(request):
                self.scheduler.add(_seeded(request))
            case Abort(request_id):
                self.scheduler.abort(request_id)
            case AddVersion():
                return self._add_version(message)
            case ForgetVersion(version):
                self._leaving[version] = None
            case ReadDone(version, error):
                self.scheduler.adapter_read(version, error)
        return True

    def _add_version(self, message: AddVersion) -> bool:
        version, host = message.version, self.scheduler.host
        if message.is_kept is False:
            host.release(version)
            return True
        self._leaving.pop(version, None)
        if not self.scheduler.add_adapter(version, message.num_bytes, message.device_bytes):
            return False
        return not message.is_kept or host.keep(version)

    def _settle(self) -> None:
        """After every change: forget what was to be forgotten and is free now, and let others have the room."""
        for version in list(self._leaving):
            if not self.scheduler.uses(version) and self.scheduler.host.evict(version):
                self._forget(version)
        self.scheduler.admit_loaded()
        self._move_adapters()

    def _forget(self, version: str) -> None:
        del self._leaving[version]
        self._move_adapters()
        self._clear_slot(version)
        self.scheduler.remove_adapter(version)
        if self.source is not None:
            self.source.gone(version)

    def _move_adapters(self) -> None:
        """Do what the ledger of host memory has decided. A version that leaves it leaves the device too: on the CPU
        they are the same bytes."""
        host, source = self.scheduler.host, self.source
        for version in host.take_evicted():
            self._clear_slot(version)
            if source is not None:
                source.drop(version)
        for version in host.take_reads():
            assert source is not None, "an adapter is away, and nobody can read it"
            source.start(version)

    def _clear_slot(self, version: str) -> None:
        slot = self.scheduler.slots.forget(version)
        if slot is not None:
            self._runner.clear_adapter(slot)

    def step(self) -> StepOutput:
        """Compute one step. Raises EngineFailure where nothing can be computed any more."""
        started = self._clock()
        batch = self.scheduler.schedule(started)
        self._move_adapters()
        sampled = self._run(batch)
        outputs = self.scheduler.update(batch, sampled)
        self._settle()
        return StepOutput(tuple(outputs), self._stats(batch, started))

    def _run(self, batch: ScheduledBatch) -> tuple[SampledToken, ...]:
        failed_versions = self._load_adapters(batch)
        results: dict[int, SampledToken] = {}
        good = []
        for index, item in enumerate(batch.sequences):
            if failed_versions & {lora.version for lora in item.sequence.request.loras}:
                results[index] = SampledToken(None, error=ErrorCode.ADAPTER_LOAD_FAILED)
            else:
                good.append(index)
        self._run_part(batch, good, results)
        self._check_runner(results)
        return tuple(results[index] for index in range(len(batch.sequences)))

    def _load_adapters(self, batch: ScheduledBatch) -> set[str]:
        """Make the step's copies; returns the versions that are not where they should be."""
        for slot in self.scheduler.slots.take_clears():
            self._runner.clear_adapter(slot)
        failed = set()
        for slot, version in batch.slot_loads:
            try:
                self._runner.load_adapter(slot, version)
            except Exception:
                logger.exception("adapter version %.12s could not be put into slot %d", version, slot)
                self.scheduler.slots.load_failed(slot)
                failed.add(version)
        return failed

    def _run_part(self, batch: ScheduledBatch, indexes: list[int], results: dict[int, SampledToken]) -> None:
        """Run some of the batch's sequences; where that fails, each half on its own, down to the one at fault."""
        if not indexes:
            return
        part = replace(batch, sequences=tuple(batch.sequences[i] for i in indexes), slot_loads=())
        try:
            results.update(zip(indexes, self._runner.run(part, self.on_forward), strict=True))
        except Exception:
            if len(indexes) == 1:
                request_id = batch.sequences[indexes[0]].sequence.request.request_id
                logger.exception("the forward pass failed for request %s", request_id)
                results[indexes[0]] = SampledToken(None, error=ErrorCode.INTERNAL_ERROR)
                return
            middle = len(indexes) // 2
            self._run_part(batch, indexes[:middle], results)
            self._run_part(batch, indexes[middle:], results)

    def _check_runner(self, results: dict[int, SampledToken]) -> None:
        """Where every request failed, find out whether it was their fault. A few bad requests at a quiet time must
        not end the server; a broken device must."""
        if not results or any(r.error not in _COMPUTE_ERRORS for r in results.values()):
            return
        try:
            self._runner.probe()
        except Exception as error:
            raise EngineFailure("every request of a step failed, and so does one that never should") from error

    def _stats(self, batch: ScheduledBatch, started: float) -> StepStats:
        scheduler = self.scheduler
        waiting = [*scheduler.waiting, *scheduler.loading.sequences]
        return StepStats(
            num_running=len(scheduler.running),
            num_waiting=len(waiting),
            num_scheduled_tokens=batch.num_tokens,
            num_preempted=scheduler.counts.num_preempted,
            kv_usage_ratio=scheduler.blocks.usage_ratio,
            prefix_queries_tokens=scheduler.counts.prefix_queries_tokens,
            prefix_hits_tokens=scheduler.counts.prefix_hits_tokens,
            step_seconds=self._clock() - started,
            running_adapters=tuple(batch.adapter_slots),
            waiting_adapters=tuple(sorted({lora.version for s in waiting for lora in s.request.loras})),
        )


def _seeded(request: Request) -> Request:
    """A request without a seed gets one here, which it keeps through preemptions."""
    if request.params.seed is not None:
        return request
    return replace(request, params=replace(request.params, seed=int.from_bytes(os.urandom(7))))
