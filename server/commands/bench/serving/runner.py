"""An open loop: each request starts when it is due, whether or not earlier ones have been answered.

Latencies count from the time at which a request is due. A server that stands still is then seen by all requests that
are due meanwhile. A client that waits for an answer before it asks again would send only a few requests in that time,
and its percentiles would hide the stop (coordinated omission).
"""

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import uvloop

from guanaco.server.commands.bench.serving.client import Exchange, Outcome, Target, ask


@dataclass(frozen=True)
class Due:
    """A request of the plan. seconds: from the run's start until it is due. leave_after: seconds after sending at which
    the client disconnects (None: at the answer's end)."""

    seconds: float
    model: str
    body: Mapping[str, Any]
    leave_after: float | None = None


@dataclass
class Run:
    """The result of a plan. duration: seconds from the start to the end of the last request that we did not cancel."""

    exchanges: list[Exchange]
    duration: float
    client_cpu: float  # share of one core that this process used
    samples: list[tuple[float, Any]] = field(default_factory=list)  # (seconds from the start, result of `watch`)


def run_load(
    target: Target,
    plan: Sequence[Due],
    *,
    timeout: float,
    max_concurrency: int | None = None,
    on_end: Callable[[Exchange], None] = lambda _: None,
    watch: Callable[[], Any] | None = None,
) -> Run:
    """Send a plan's requests and return all exchanges in the plan's order.

    timeout: seconds of one request, from its sending. max_concurrency: most requests on the way; others that are due
    wait here, and their waiting counts. on_end: called with each exchange. watch: an async function, called four times
    a second; its results become `samples`.
    """
    return uvloop.run(_run(target, plan, timeout, max_concurrency, on_end, watch))


async def _run(
    target: Target,
    plan: Sequence[Due],
    timeout: float,
    max_concurrency: int | None,
    on_end: Callable[[Exchange], None],
    watch: Callable[[], Any] | None,
) -> Run:
    _allow_connections(len(plan))
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    exchanges = [Exchange(i, due.model, due.seconds) for i, due in enumerate(plan)]
    samples: list[tuple[float, Any]] = []
    gc.freeze()  # the plan is never searched for garbage during the run
    cpu, start = time.process_time(), time.perf_counter()

    async def one(due: Due, exchange: Exchange) -> None:
        async with places:
            await ask(target, due.body, exchange, start=start, timeout=timeout, leave_after=due.leave_after)
        on_end(exchange)

    async def look() -> None:
        assert watch is not None
        while True:
            samples.append((time.perf_counter() - start, await watch()))
            await asyncio.sleep(0.25)

    watching = asyncio.ensure_future(look()) if watch is not None else None
    tasks = []
    try:
        for due, exchange in zip(plan, exchanges, strict=True):
            wait = start + due.seconds - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(due, exchange)))
        await asyncio.gather(*tasks)
    finally:
        if watching is not None:
            watching.cancel()
        for task in tasks:
            task.cancel()
        gc.unfreeze()
    duration = max((e.ended for e in exchanges if e.outcome is not Outcome.CANCELLED), default=0.0)
    wall = time.perf_counter() - start
    return Run(exchanges, duration, (time.process_time() - cpu) / wall if wall > 0 else 0.0, samples)


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
