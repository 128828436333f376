"""The engine: schedule, run, update, once per step. Synchronous: a thread drives it (`async_engine`), or a plain loop.

If a step fails, the engine finds the requests at fault, so that one bad request does not end the others.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from guanaco.adapters.residency.messages import AddVersion
from guanaco.adapters.residency.moves import Copy, Evict, Moves, Read
from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.engine.request import (
    Message,
    SampledToken,
    ScheduledBatch,
    StepOutput,
    StepStats,
    Submit,
)
from guanaco.server.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

# The errors of requests that the forward pass could not compute, and of requests whose adapter could not be copied to
# the device.
_COMPUTE_ERRORS = (ErrorCode.INTERNAL_ERROR, ErrorCode.ADAPTER_LOAD_FAILED)


class EngineFailure(GuanacoError):
    """The engine cannot compute any more; the process should end and be started again."""


class Runner(Protocol):
    """What computes a step: `model_runner.ModelRunner`, or a fake one in the tests."""

    def load_adapter(self, slot: int, version: str) -> None:
        """Put an adapter version into an adapter slot."""

    def clear_adapter(self, slot: int) -> None:
        """Empty an adapter slot. No sequence uses it."""

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        """Compute the batch: one result for each of its sequences. Running the same batch again must be harmless.

        `begin` is called when the forward pass begins. Its kernels release Python's interpreter lock, so from then on
        other threads can work.
        """

    def probe(self) -> None:
        """Compute a pass that belongs to no request. Raises if the device cannot compute."""


class AdapterSource(Protocol):
    """Reads adapters into host memory: `server.adapters.tiers.AdapterTiers`, or a fake one in the tests."""

    def start(self, version: str) -> None:
        """Begin to read a version. A `ReadDone` message follows when it is in host memory or could not be read."""

    def drop(self, version: str) -> None:
        """Free the host copy of a version."""

    def gone(self, version: str) -> None:
        """Called when a version was forgotten (`ForgetVersion`): it is neither on the device nor in host memory, and
        no read of it runs."""


class Engine:
    """`handle` takes messages, `step` returns one StepOutput per step. Not thread-safe: one thread calls both."""

    def __init__(self, scheduler: Scheduler, runner: Runner, clock: Callable[[], float] = awake_seconds) -> None:
        self.scheduler = scheduler
        self.source: AdapterSource | None = None  # None: all adapters stay in host memory
        self.on_forward: Callable[[], None] = lambda: None  # called when a step's forward pass begins
        self._runner = runner
        self._clock = clock
        self._first_moves: Moves = ()  # moves of `keep_from_start`, made when the first messages are handled

    @property
    def has_work(self) -> bool:
        left = self.seconds_left
        return self.scheduler.has_work or (left is not None and left < 0)

    @property
    def seconds_left(self) -> float | None:
        """How many seconds an engine without work may sleep: until a request has waited too long for its adapters."""
        return self.scheduler.loading.seconds_left(self._clock())

    def handle(self, *messages: Message) -> tuple[bool, ...]:
        """Handle messages in order, and move adapters. Returns the answers of `Scheduler.handle`, and raises as it
        does."""
        answers, moves = self.scheduler.handle(*(_seeded(message) for message in messages))
        first, self._first_moves = self._first_moves, ()
        self._move((*first, *moves))
        return answers

    def keep_from_start(self, *messages: AddVersion) -> tuple[bool, ...]:
        """Keep versions in host memory, before the engine's thread runs. Returns for each whether there was room. They
        are read later, with the first messages, since only a running engine can handle the end of a read."""
        answers, self._first_moves = self.scheduler.handle(*messages)
        return answers

    def step(self) -> StepOutput:
        """Compute one step. Raises EngineFailure if the device cannot compute any more."""
        started = self._clock()
        batch = self.scheduler.schedule(started)
        sampled = self._run(batch, self._move(batch.moves))
        outputs, moves = self.scheduler.update(batch, sampled)
        self._move(moves)
        return StepOutput(outputs, self._stats(batch, started))

    def _run(self, batch: ScheduledBatch, failed_versions: set[str]) -> tuple[SampledToken, ...]:
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

    def _move(self, moves: Moves) -> set[str]:
        """Make moves of adapters, in order. Returns the versions that could not be copied to the device."""
        failed = set()
        for move in moves:
            match move:
                case Evict():
                    self._evict(move)
                case Read(version):
                    assert self.source is not None, "an adapter is away, and nobody can read it"
                    self.source.start(version)
                case Copy(version, slot):
                    try:
                        self._runner.load_adapter(slot, version)
                    except Exception:
                        logger.exception("adapter version %.12s could not be put into slot %d", version, slot)
                        self.scheduler.residency.copy_failed(slot)
                        failed.add(version)
        return failed

    def _evict(self, move: Evict) -> None:
        if move.slot is not None:
            self._runner.clear_adapter(move.slot)
        if self.source is not None and move.from_host:
            self.source.drop(move.version)
        if self.source is not None and move.is_forgotten:
            self.source.gone(move.version)

    def _run_part(self, batch: ScheduledBatch, indexes: list[int], results: dict[int, SampledToken]) -> None:
        """Run some of the batch's sequences. If that fails, run each half on its own, down to the sequence at fault."""
        if not indexes:
            return
        part = replace(batch, sequences=tuple(batch.sequences[i] for i in indexes), moves=())
        try:
            results.update(zip(indexes, self._runner.run(part, self.on_forward), strict=True))
        except Exception:
            if len(indexes) == 1 and part.sequences[0].draft:
                # The larger pass may have needed memory that is not there: try again without the draft.
                plain = part.sequences[0]._replace(draft=())
                sequences = tuple(plain if i == indexes[0] else item for i, item in enumerate(batch.sequences))
                self._run_part(replace(batch, sequences=sequences), indexes, results)
                return
            if len(indexes) == 1:
                request_id = batch.sequences[indexes[0]].sequence.request.request_id
                logger.exception("the forward pass failed for request %s", request_id)
                results[indexes[0]] = SampledToken(None, error=ErrorCode.INTERNAL_ERROR)
                return
            middle = len(indexes) // 2
            self._run_part(batch, indexes[:middle], results)
            self._run_part(batch, indexes[middle:], results)

    def _check_runner(self, results: dict[int, SampledToken]) -> None:
        """If every request of a step failed, compute the runner's probe, and raise EngineFailure if that fails, too. So
        a step in which all requests are bad does not end the server."""
        if not results or any(r.error not in _COMPUTE_ERRORS for r in results.values()):
            return
        try:
            self._runner.probe()
        except Exception as error:
            raise EngineFailure("every request of a step failed, and so does the engine's own test request") from error

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
            sequence_versions=tuple(s.versions for s in scheduler.running),
            drafts=tuple(scheduler.counts.drafts),
        )


def _seeded(message: Message) -> Message:
    """Give a request without a seed a random one, which it keeps through preemptions."""
    if not isinstance(message, Submit) or message.request.params.seed is not None:
        return message
    params = replace(message.request.params, seed=int.from_bytes(os.urandom(7)))
    return Submit(replace(message.request, params=params))
