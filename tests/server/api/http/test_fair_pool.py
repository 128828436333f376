"""Worker threads that take turns: by tenant, then by topic; a caller that leaves takes nobody's turn."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from guanaco.server.api.http.fair_pool import FairPool, Lane

WAIT = 30.0


class Bench:
    """A pool with one thread, which a first piece of work keeps busy until `open`."""

    def __init__(self) -> None:
        self.pool = FairPool(1, "test")
        self.gate = threading.Event()
        self.done: list[str] = []

    async def block(self) -> asyncio.Task[object]:
        began = threading.Event()

        def work() -> None:
            began.set()
            assert self.gate.wait(WAIT)

        task = asyncio.create_task(self.pool.run(Lane("first"), work))
        assert await asyncio.to_thread(began.wait, WAIT)
        return task

    async def queue(self, tenant: str, topic: str, label: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self.pool.run(Lane(tenant, topic), self.done.append, label))
        await asyncio.sleep(0)
        return task


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WAIT))


def test_tenants_and_then_topics_take_turns() -> None:
    async def work() -> None:
        bench = Bench()
        tasks: list[asyncio.Task[Any]] = [await bench.block()]
        for i in range(3):
            tasks.append(await bench.queue("flood", "pirate", f"flood pirate {i}"))
        tasks.append(await bench.queue("flood", "terse", "flood terse"))
        tasks.append(await bench.queue("other", "pirate", "other"))
        bench.gate.set()
        await asyncio.gather(*tasks)
        assert bench.done == ["flood pirate 0", "other", "flood terse", "flood pirate 1", "flood pirate 2"]
        bench.pool.shutdown()

    run(work())


def test_a_cancelled_caller_takes_no_turn() -> None:
    async def work() -> None:
        bench = Bench()
        first = await bench.block()
        gone = await bench.queue("a", "x", "gone")
        stays = await bench.queue("a", "x", "stays")
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        bench.gate.set()
        await asyncio.gather(first, stays)
        assert bench.done == ["stays"]
        await bench.pool.run(Lane("b"), bench.done.append, "later")
        bench.pool.shutdown()

    run(work())


def test_a_caller_cancelled_while_its_work_runs_leaves_the_thread_busy() -> None:
    async def work() -> None:
        bench = Bench()
        first = await bench.block()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        waits = await bench.queue("a", "x", "next")
        assert not bench.done
        bench.gate.set()
        await waits
        assert bench.done == ["next"]
        bench.pool.shutdown()

    run(work())


def test_a_caller_cancelled_with_its_turn_passes_it_on() -> None:
    async def work() -> None:
        bench = Bench()
        first = await bench.block()
        given = await bench.queue("a", "x", "given")
        after = await bench.queue("a", "x", "after")
        turn = bench.pool._waiting["a"].topics["x"][0]
        turn.add_done_callback(lambda _: given.cancel())  # runs before the caller does
        bench.gate.set()
        await asyncio.gather(first, after)
        assert "after" in bench.done
        bench.pool.shutdown()

    run(work())


def test_failures_reach_the_caller_and_free_the_thread() -> None:
    async def work() -> None:
        pool = FairPool(1, "test")
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await pool.run(Lane("a"), divmod, 1, 0)
        assert await pool.run(Lane("a"), divmod, 7, 2) == (3, 1)
        pool.shutdown()

    run(work())
