"""The engine behind the event loop: every stream ends once and with a reason, whatever happens to engine or reader."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine import async_engine, awake_clock
from guanaco.server.engine.async_engine import (
    EngineUnavailable,
    QueueCaps,
)
from guanaco.server.engine.awake_clock import AwakeClock
from guanaco.server.engine.request import (
    FinishReason,
)
from support.simulation.engine_bench import WAIT, Letters, nothing, read, request, run, running, text_of
from support.simulation.fake_runner import expected_tokens


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
            bench.runner.probe = lambda: bench.runner.run(None, nothing)  # type: ignore[method-assign,arg-type]
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
