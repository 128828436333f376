"""A generation's one reader waits for mail on a future: no wake-up is lost, and nothing is waited for that is there."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from guanaco.server.api.generation.choices import Generation

ENDLESS = 1e6  # seconds


def running() -> Generation:
    """A generation with one unfinished choice, without an engine."""
    nothing = cast(Any, None)
    generation = Generation(nothing, nothing, nothing, nothing)
    generation._num_unfinished = 1
    return generation


async def taken(generation: Generation) -> object:
    return await anext(generation, None)


async def peeked(generation: Generation) -> object:
    return await generation.peek(ENDLESS)


@pytest.mark.parametrize("wait", [taken, peeked])
def test_cancel_ends_a_wait(wait: Callable[[Generation], Coroutine[Any, Any, object]]) -> None:
    async def run() -> None:
        generation = running()
        waiting = asyncio.create_task(wait(generation))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        await generation.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert waiting.done()
        assert waiting.result() is None

    asyncio.run(run())


def test_peek_does_not_wait_after_a_cancel() -> None:
    generation = running()
    with pytest.raises(StopIteration):  # it ended at once
        generation.cancel().send(None)
    with pytest.raises(StopIteration):
        generation.peek(ENDLESS).send(None)


def test_peek_does_not_wait_for_what_is_there() -> None:
    generation = running()
    generation._put(ValueError("came before the peek"))
    with pytest.raises(ValueError, match="before the peek"):
        generation.peek(ENDLESS).send(None)


def test_mail_comes_after_a_wait_that_was_given_up() -> None:
    """A peek whose patience ended and a reader that was cancelled leave a future that is done."""

    async def run() -> None:
        generation = running()
        await generation.peek(0)
        reader = asyncio.create_task(taken(generation))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        generation._put(ValueError("came late"))
        await anext(generation)

    with pytest.raises(ValueError, match="came late"):
        asyncio.run(run())
