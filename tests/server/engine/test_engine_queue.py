"""The engine's queue and its end: what is refused, and what a drain or a stop leaves."""

import asyncio

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine import async_engine
from guanaco.server.engine.async_engine import (
    EngineOverloaded,
    EngineUnavailable,
    NeverFits,
)
from guanaco.server.engine.request import (
    FinishReason,
)
from support.simulation.engine_bench import WAIT, read, request, run, running, text_of


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
