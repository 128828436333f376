"""The real HTTP server over the real engine and scheduler; only the model is made up, and fails as a test chooses."""

import asyncio
import hashlib
import threading
from collections.abc import Callable
from typing import Any

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.server.api.generation.state import ApiState
from guanaco.server.engine.async_engine import AsyncEngine, QueueCaps
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.request import SampledToken, ScheduledBatch, ScheduledSequence, TokenLogprob
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.server.api_server import MAX_MODEL_LEN, WAIT, LiveServer, make_state
from support.server.fake_engine import EOS, FakeTokenizer

BLOCK_SIZE = 16


def next_token(token_ids: tuple[int, ...], version: str) -> int:
    """The made-up model: a lower-case letter that depends on every token so far, and on the adapter."""
    digest = hashlib.sha256(bytes(str((token_ids, version)), "ascii")).digest()
    return ord("a") + digest[0] % 26


def text_of(prompt_ids: tuple[int, ...], version: str, count: int) -> str:
    """What the made-up model writes after a prompt."""
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(next_token(tuple(ids), version))
    return bytes(ids[len(prompt_ids) :]).decode()


class MadeUpModel:
    """A `Runner`. `pause` holds every step; `fail` is raised by the next one; `bad_prompt` makes one row NaN."""

    def __init__(self) -> None:
        self.going = threading.Event()
        self.going.set()
        self.fail: BaseException | None = None
        self.not_a_number_after: int | None = None  # tokens of a sequence
        self.num_steps = 0

    def load_adapter(self, slot: int, version: str) -> None:
        pass

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        begin()
        assert self.going.wait(WAIT), "a test forgot to open the gate"
        if self.fail is not None:
            raise self.fail
        self.num_steps += 1
        return tuple(self._token(item) for item in batch.sequences)

    def probe(self) -> None:
        if self.fail is not None:
            raise self.fail

    def _token(self, item: ScheduledSequence) -> SampledToken:
        sequence = item.sequence
        if not item.needs_sample:
            return SampledToken(None)
        if self.not_a_number_after == sequence.num_output_tokens:
            return SampledToken(None, error="numerical_error")
        loras = sequence.request.loras
        token = next_token(tuple(sequence.token_ids), loras[0].version if loras else "")
        logprob = None
        if sequence.request.params.logprobs is not None:
            logprob = TokenLogprob(token, -0.5, ((token, -0.5),))
        return SampledToken(token, logprob)


class EngineServer(LiveServer):
    """A LiveServer whose engine is a real one; `model` and `scheduler` are within reach."""

    def __init__(self, state: ApiState, model: MadeUpModel, scheduler: Scheduler) -> None:
        super().__init__(state)
        self.model = model
        self.scheduler = scheduler

    @property
    def num_in_engine(self) -> int:
        return len(self.state.engine._streams)

    def wait(self, condition: Any) -> None:
        """Wait until `condition()` holds; the engine's thread tells nobody when."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        self.run(poll())

    def assert_quiet(self) -> None:
        """No sequence, no block and no admission is left behind."""
        self.wait(lambda: not self.scheduler.running and not self.scheduler.waiting)
        blocks = self.scheduler.blocks
        self.wait(lambda: blocks.num_free_blocks == blocks.num_blocks)
        assert self.run(self.state.lifecycle.wait_all_closed(WAIT))
        assert self.state.lifecycle.num_admitted == 0


def make_engine_server(*, num_blocks: int = 512, **settings: Any) -> EngineServer:
    state = make_state(**settings)
    options = state.settings
    limits = Limits(options.max_num_seqs, options.max_num_batched_tokens, MAX_MODEL_LEN, options.queue_timeout)
    scheduler = Scheduler(limits, BlockManager(num_blocks, BLOCK_SIZE), ResidencyLedger(SlotTable(2)), frozenset({EOS}))
    model = MadeUpModel()
    engine = AsyncEngine(
        Engine(scheduler, model),
        FakeTokenizer(),
        QueueCaps(options.max_queued_requests, options.max_queued_tokens),
        step_timeout_seconds=options.step_timeout,
        on_step=state.metrics.observe_step,
    )
    state.metrics.set_heartbeat(lambda: engine.heartbeat_age_seconds)
    object.__setattr__(state, "engine", engine)
    return EngineServer(state, model, scheduler)
