"""The engine behind the event loop: every stream ends once and with a reason, whatever happens to engine or reader."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine import async_engine, awake_clock
from guanaco.server.engine.async_engine import (
    AsyncEngine,
    EngineOverloaded,
    EngineUnavailable,
    NeverFits,
    QueueCaps,
)
from guanaco.server.engine.awake_clock import AwakeClock
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.request import (
    FinishReason,
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


def _nothing() -> None:
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


def test_a_step_is_told_while_the_next_one_computes() -> None:
    """Its tokens don't wait for the next step's end, and a step that nothing follows is told at once."""

    async def test() -> None:
        async with running() as bench:
            steps = threading.Semaphore(0)
            one_by_one = SimpleNamespace(
                wait=lambda seconds: steps.acquire(timeout=seconds), set=lambda: steps.release(9)
            )
            bench.runner.going = one_by_one  # type: ignore[assignment]
            stream = bench.engine.submit(request("a", max_tokens=3))
            for number in range(1, 4):
                steps.release()
                assert (await anext(stream)).num_output_tokens == number
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(test)


def test_three_hundred_streams_get_their_own_tokens() -> None:
    async def test() -> None:
        async with running() as bench:
            bench.engine._caps = QueueCaps(1000, 100_000)
            wanted = [
                request(f"r{n}", adapter=(None, "x", "y")[n % 3], max_tokens=1 + n % 40, seed=n) for n in range(300)
            ]
            streams = [bench.engine.submit(one) for one in wanted]
            for one, outputs in zip(wanted, await asyncio.gather(*map(read, streams)), strict=True):
                count = one.params.max_tokens
                assert "".join(output.text for output in outputs) == text_of(one, count)
                assert sum((output.token_ids for output in outputs), ()) == tuple(expected_tokens(one, count, 50))
                assert outputs[-1].finish_reason is FinishReason.LENGTH
                assert outputs[-1].num_output_tokens == count
                assert outputs[-1].num_prompt_tokens == len(one.prompt_token_ids)
                assert next(o for o in outputs if o.queue_seconds is not None).queue_seconds >= 0
            await bench.assert_quiet()
            assert max(stats.num_running for stats in bench.steps) > 30, "they ran together"
            assert bench.runner.violation is None

    run(test)


def test_an_eos_ends_the_text_without_being_part_of_it() -> None:
    one = request("eos", max_tokens=50)
    tokens = expected_tokens(one, 50, 50)
    eos = tokens[5]

    async def test() -> None:
        async with running(eos=eos) as bench:
            outputs = await read(bench.engine.submit(one))
            assert outputs[-1].finish_reason is FinishReason.STOP
            assert "".join(output.text for output in outputs) == Letters().decode(tokens[: tokens.index(eos)])
            assert outputs[-1].num_output_tokens == tokens.index(eos) + 1

    run(test)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_engines_work_too(include: bool) -> None:
    whole = text_of(request("s", max_tokens=200), 200)
    stop = whole[30:33]
    one = request("s", max_tokens=200, stop_strings=(stop,), include_stop_str=include)

    async def test() -> None:
        async with running() as bench:
            bench.runner.seconds_per_step = 0.01  # two seconds for the whole of it, if nobody ended it
            outputs = await read(bench.engine.submit(one))
            end = whole.index(stop)
            assert "".join(output.text for output in outputs) == whole[: end + len(stop) * include]
            assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, stop)
            await bench.assert_quiet()
            assert sum(stats.num_scheduled_tokens for stats in bench.steps) < 150

    run(test)


@pytest.mark.parametrize("at", ["queue", "first step", "later"])
def test_a_reader_that_leaves_ends_the_request_within_a_step(at: str) -> None:
    async def test() -> None:
        async with running() as bench:
            if at != "later":
                bench.runner.going.clear()
            async with bench.engine.submit(request("gone", max_tokens=200)) as stream:
                if at == "first step":
                    await bench.until(lambda: bench.scheduler.running)
                elif at == "later":
                    async for output in stream:
                        if output.num_output_tokens > 5:
                            break
                    bench.runner.going.clear()
                    await asyncio.sleep(0.01)
            before = bench.runner.num_runs
            bench.runner.going.set()
            await bench.assert_quiet()
            assert bench.runner.num_runs - before <= 2, "the step that was running, and at most one more"
            assert [output async for output in stream] == []

    run(test)


def test_a_reader_that_is_slow_loses_nothing_and_holds_nobody_up() -> None:
    async def test() -> None:
        async with running() as bench:
            slow, quick = request("slow", max_tokens=100), request("quick", max_tokens=100)
            stream = bench.engine.submit(slow)
            await read(bench.engine.submit(quick))
            await bench.assert_quiet()
            outputs = await read(stream)
            assert "".join(output.text for output in outputs) == text_of(slow, 100)

    run(test)


@pytest.mark.parametrize("failure", [ValueError("a bug"), SystemExit(1), KeyboardInterrupt(), MemoryError()])
def test_an_engine_that_dies_ends_every_stream_with_a_reason(failure: BaseException) -> None:
    async def test() -> None:
        async with running() as bench:
            bench.runner.going.clear()
            bench.runner.probe = lambda: bench.runner.run(None, _nothing)  # type: ignore[method-assign,arg-type]
            streams = [bench.engine.submit(request(f"r{n}")) for n in range(3)]
            bench.runner.fatal = failure
            bench.runner.going.set()
            for outputs in await asyncio.gather(*map(read, streams)):
                assert (outputs[-1].finish_reason, outputs[-1].error) == (FinishReason.ERROR, ErrorCode.ENGINE_DEAD)
            health = bench.engine.health()
            assert (health.live, health.ready) == (False, False)
            assert health.reason
            with pytest.raises(EngineUnavailable) as refusal:
                bench.engine.submit(request("late"))
            assert not refusal.value.draining
            await asyncio.sleep(0.05)
            assert bench.deaths == 1

    run(test)


def test_a_step_that_hangs_ends_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(async_engine, "_JOIN_SECONDS", 0.05)

    async def test() -> None:
        async with running(step_timeout=0.1) as bench:
            assert bench.engine.heartbeat_age_seconds == 0.0
            bench.runner.going.clear()
            outputs = await read(bench.engine.submit(request("stuck")))
            assert outputs[-1].error == ErrorCode.ENGINE_DEAD
            assert not bench.engine.health().live
            assert bench.engine.heartbeat_age_seconds > 0.1
            assert bench.deaths == 1
            bench.runner.going.set()  # it comes back after all: nobody hears of it, and it stays dead
            await asyncio.sleep(0.05)
            assert not bench.engine.health().live
            assert bench.deaths == 1

    run(test)


def test_a_step_during_which_the_process_was_stopped_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP, a paused container: the clock is an hour on all at once, and the step is as old as that."""
    offset = [0.0]
    clock = AwakeClock(lambda: time.monotonic() + offset[0])
    monkeypatch.setattr(awake_clock, "CLOCK", clock)
    monkeypatch.setattr(async_engine, "CLOCK", clock)

    async def test() -> None:
        async with running(step_timeout=WAIT) as bench:
            bench.runner.going.clear()
            stream = bench.engine.submit(request("good"))
            await bench.until(lambda: bench.engine._busy_since is not None)
            offset[0] += 3600
            assert bench.engine.heartbeat_age_seconds < WAIT
            await asyncio.sleep(3 * async_engine._WATCH_SECONDS)
            assert bench.engine.health().live
            bench.runner.going.set()
            assert "".join(output.text for output in await read(stream)) == text_of(request("good"), 8)

    run(test)


def test_a_bad_request_is_no_ones_death() -> None:
    async def test() -> None:
        async with running() as bench:
            bench.runner.faults.raising_ids = {"bad"}
            good = request("good")
            bad, other = bench.engine.submit(request("bad")), bench.engine.submit(good)
            assert (await read(bad))[-1].error == ErrorCode.INTERNAL_ERROR
            assert "".join(output.text for output in await read(other)) == text_of(good, 8)
            assert bench.engine.health().ready
            assert bench.deaths == 0

    run(test)


def test_tokens_that_cannot_be_decoded_end_their_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with running() as bench:
            good = request("good", max_tokens=30)
            other, stream = bench.engine.submit(good), bench.engine.submit(request("bad", max_tokens=200))

            def fail(*_: Any, **__: Any) -> str:
                raise UnicodeError("a tokenizer with a bug")

            monkeypatch.setattr(stream._detokenizer, "append", fail)
            assert (await read(stream))[-1].error == "internal_error"
            assert "".join(output.text for output in await read(other)) == text_of(good, 30)
            await bench.assert_quiet()

    run(test)


def test_draining_finishes_what_is_open_and_takes_nothing_new() -> None:
    async def test() -> None:
        async with running() as bench:
            one = request("open", max_tokens=60)
            stream = bench.engine.submit(one)
            drain = asyncio.ensure_future(bench.engine.drain(WAIT))
            await asyncio.sleep(0)
            assert bench.engine.health() == async_engine.Health(live=True, ready=False, reason="draining")
            with pytest.raises(EngineUnavailable) as refusal:
                bench.engine.submit(request("late"))
            assert refusal.value.draining
            assert "".join(output.text for output in await read(stream)) == text_of(one, 60)
            await drain

    run(test)


def test_the_deadline_of_a_drain_ends_the_rest() -> None:
    async def test() -> None:
        async with running() as bench:
            bench.runner.going.clear()
            stream = bench.engine.submit(request("long", max_tokens=200))
            await bench.engine.drain(0.05)
            assert (await read(stream))[-1].error == ErrorCode.SERVER_SHUTTING_DOWN
            bench.runner.going.set()
            await bench.assert_quiet()

    run(test)


def test_stopping_ends_what_is_open() -> None:
    async def test() -> None:
        async with running() as bench:
            stream = bench.engine.submit(request("open", max_tokens=200))
            await bench.engine.stop()
            assert (await read(stream))[-1].error == ErrorCode.SERVER_SHUTTING_DOWN
            assert not bench.engine._thread.is_alive()

    run(test)


@pytest.mark.parametrize(("prompt", "accepted"), [((1, 2), 3), ((1,) * 45, 2)])
def test_a_full_queue_refuses_with_a_time_to_come_back(prompt: tuple[int, ...], accepted: int) -> None:
    """Three requests may wait, or a hundred prompt tokens. None of them has been let in: the engine stands still."""

    async def test() -> None:
        async with running() as bench:
            bench.runner.going.clear()
            first = bench.engine.submit(request("first"))
            await bench.until(lambda: bench.scheduler.running)
            streams = [bench.engine.submit(request(f"r{n}", prompt=prompt)) for n in range(accepted)]
            with pytest.raises(EngineOverloaded) as refusal:
                bench.engine.submit(request("one too many", prompt=prompt))
            assert 1.0 <= refusal.value.retry_after_seconds <= 60.0
            bench.runner.going.set()
            for outputs in await asyncio.gather(*map(read, [first, *streams])):
                assert outputs[-1].finish_reason is FinishReason.LENGTH
            await read(bench.engine.submit(request("afterwards", prompt=prompt)))

    run(test)


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    async def test() -> None:
        async with running() as bench:
            with pytest.raises(ValueError, match="256"):
                bench.engine.submit(request("huge", prompt=(1,) * 300))
            await bench.assert_quiet()

    run(test)


def test_requests_that_belong_together_come_in_together_or_not_at_all() -> None:
    """Prompts and choices of one HTTP request: none of them is computed and then thrown away."""

    async def test() -> None:
        async with running() as bench:
            bench.runner.going.clear()
            first = bench.engine.submit(request("first"))
            await bench.until(lambda: bench.scheduler.running)
            two = bench.engine.submit_all([request("a"), request("b")])
            with pytest.raises(EngineOverloaded):
                bench.engine.submit_all([request("c"), request("d")])  # only one more may wait
            one = bench.engine.submit(request("e"))
            assert set(bench.engine._streams) == {"first", "a", "b", "e"}
            bench.runner.going.set()
            await asyncio.gather(*map(read, [first, *two, one]))
            await bench.assert_quiet()

    run(test)


@pytest.mark.parametrize(
    ("count", "prompt", "numbers"), [(4, (1,), "lets 3 of them wait"), (2, (1,) * 60, "with 100 tokens")]
)
def test_more_than_may_ever_wait_is_no_reason_to_come_back(count: int, prompt: tuple[int, ...], numbers: str) -> None:
    """An idle engine would refuse it the next time, too."""

    async def test() -> None:
        async with running() as bench:
            with pytest.raises(NeverFits, match=numbers):
                bench.engine.submit_all([request(f"r{n}", prompt=prompt) for n in range(count)])
            await read(bench.engine.submit(request("alone", prompt=(1,) * 120)))  # whatever its length, it is next
            await read(bench.engine.submit_all([request(f"s{n}") for n in range(3)])[2])
            await bench.assert_quiet()

    run(test)
