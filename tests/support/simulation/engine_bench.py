"""An AsyncEngine over the arithmetic model, for tests: requests, streams, and what must be left at the end."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.server.engine.async_engine import (
    AsyncEngine,
    QueueCaps,
)
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.request import (
    LoraRef,
    Request,
    SampledToken,
    SamplingParams,
    ScheduledBatch,
    StepStats,
)
from guanaco.server.engine.request_stream import RequestStream, TextOutput
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.simulation.fake_runner import FakeRunner, expected_tokens

LIMITS = Limits(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=256, queue_timeout_seconds=0.0)
WAIT = 20.0  # seconds after which a test that hangs has failed


class Letters:
    """Token n is the n-th letter of an alphabet of 50."""

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("A") + token) for token in ids)


class GatedRunner(FakeRunner):
    """Waits for `going` in every step, and raises `fatal` if it is set."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.going = threading.Event()
        self.going.set()
        self.fatal: BaseException | None = None
        self.seconds_per_step = 0.0

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        begin()
        self.going.wait(WAIT)
        time.sleep(self.seconds_per_step)
        if self.fatal is not None:
            raise self.fatal
        return super().run(batch, begin)


def nothing() -> None:
    pass


class Bench:
    """An AsyncEngine over the arithmetic model."""

    def __init__(self, *, eos: int | None = None, num_blocks: int = 1024, step_timeout: float = 60.0) -> None:
        self.runner = GatedRunner(num_blocks, 4, 4)
        eos_ids = frozenset() if eos is None else frozenset({eos})
        self.scheduler = Scheduler(LIMITS, BlockManager(num_blocks, 4), ResidencyLedger(SlotTable(4)), eos_ids)
        self.deaths = 0
        self.steps: list[StepStats] = []
        self.engine = AsyncEngine(
            Engine(self.scheduler, self.runner),
            Letters(),
            QueueCaps(max_requests=3, max_tokens=100),
            step_timeout_seconds=step_timeout,
            on_step=self.steps.append,
            on_death=self._died,
        )

    def _died(self) -> None:
        self.deaths += 1

    async def until(self, condition: Any) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            await asyncio.sleep(0.002)

    async def assert_quiet(self) -> None:
        """Nothing is left behind of any request."""
        await self.until(lambda: not self.scheduler.running and not self.scheduler.waiting)
        await self.until(lambda: self.scheduler.blocks.num_free_blocks == self.scheduler.blocks.num_blocks)
        assert not self.engine._streams


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench(**options)
    bench.engine.start()
    try:
        yield bench
    finally:
        bench.runner.going.set()
        await bench.engine.stop()


def request(name: str, *, adapter: str | None = None, prompt: tuple[int, ...] = (), **fields: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 8, "seed": 1, **fields})
    return Request(name, prompt or tuple(name.encode()), params, () if adapter is None else (LoraRef(adapter),))


async def read(stream: RequestStream) -> list[TextOutput]:
    outputs = [output async for output in stream]
    ends = [output.finish_reason for output in outputs if output.finish_reason is not None]
    assert len(ends) == 1, "a stream ends once"
    assert outputs[-1].finish_reason is ends[0], "… with its last output"
    return outputs


def run(test: Any) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), WAIT)

    asyncio.run(limited())


def text_of(wanted: Request, count: int) -> str:
    return Letters().decode(expected_tokens(wanted, count, 50))
