"""Worker threads that tenants use in turns: a tenant's flood of work delays mostly that tenant.

Work waits in lanes, one for each tenant and topic. A free thread takes work of the next tenant, and of its next topic.
Knows no requests. Lives on the event loop; the routes give it work that must not run there.
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
    """A queue of waiting work: its tenant (API key), and its topic (model, and whether the body is large)."""

    tenant: Hashable
    topic: Hashable = None


@dataclass
class _Tenant:
    topics: dict[Hashable, deque[asyncio.Future[None]]] = field(default_factory=dict)


class FairPool:
    """`num_threads` threads. Call all methods on one event loop."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_idle = num_threads
        self._waiting: dict[Hashable, _Tenant] = {}  # tenants with waiting work, in the order of their turns

    async def run(self, lane: Lane, function: Callable[..., T], *args: object) -> T:
        """Run `function(*args)` on a thread when it is the lane's turn, and return its result.

        If the caller is cancelled, a function that already runs goes on, and its thread is busy until it ends.
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
        """Start no more work. Functions that run go on, but are not waited for."""
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
        """Give a thread that has become free to the next waiting work."""
        while self._waiting:
            turn = self._take_next()
            if not turn.done():
                turn.set_result(None)
                return
        self._num_idle += 1

    def _take_next(self) -> asyncio.Future[None]:
        """Take the next work: the first of the first tenant's first topic. If more waits there, both go to the end of
        their queues."""
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
