"""Worker threads that take turns between those who wait: one tenant's flood delays itself, and hardly anybody else.

Work waits in lanes, one for each tenant and topic. A free thread goes to the next tenant, and there to the next topic.
Knows no requests. Lives on the event loop; the routes hand it work that must not run there.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Lane:
    """Where work waits: whose it is, and what it is about."""

    tenant: Hashable
    topic: Hashable = None


@dataclass
class _Tenant:
    topics: dict[Hashable, deque[asyncio.Future[None]]] = field(default_factory=dict)


class FairPool:
    """`num_threads` threads. All methods are for one event loop."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_idle = num_threads
        self._waiting: dict[Hashable, _Tenant] = {}  # in the order of their turns

    async def run(self, lane: Lane, function: Callable[..., T], *args: object) -> T:
        """The result of `function(*args)`, which runs on a thread once it is the lane's turn.

        If the caller is cancelled, what already runs goes on, and its thread counts as busy until it ends.
        """
        await self._wait_for_turn(lane)
        loop = asyncio.get_running_loop()

        def ended(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._pass_on)

        try:
            work = self._executor.submit(function, *args)
        except BaseException:
            self._pass_on()
            raise
        work.add_done_callback(ended)
        return await asyncio.wrap_future(work)

    def shutdown(self) -> None:
        """Take no more work. What runs goes on; nobody waits for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_turn(self, lane: Lane) -> None:
        if self._num_idle:
            self._num_idle -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        topics = self._waiting.setdefault(lane.tenant, _Tenant()).topics
        topics.setdefault(lane.topic, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """A thread has become free: it goes to whoever is next."""
        while self._waiting:
            turn = self._take_next()
            if not turn.done():
                turn.set_result(None)
                return
        self._num_idle += 1

    def _take_next(self) -> asyncio.Future[None]:
        """The first of the first topic of the first tenant. Both go to the end of their queues if more waits there."""
        tenant = next(iter(self._waiting))
        topics = self._waiting.pop(tenant).topics
        topic = next(iter(topics))
        turns = topics.pop(topic)
        first = turns.popleft()
        if turns:
            topics[topic] = turns
        if topics:
            self._waiting[tenant] = _Tenant(topics)
        return first
