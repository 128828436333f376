"""Answers that are sent before the request's body has arrived, such as 401, 413 and 429.

The rest of the body must be read and thrown away: it would be read as the next request, and closing at once would reset
the connection before the client has read the answer. So the connection is closed when the rest has come, within the
guard's limits of time and bytes. It stays open only if the client announced a small body. Used by `guard`.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# After an early answer, a body announced with at most this many bytes is read to its end, and the connection stays
# open. httpx and others send head and body separately, and a refused chat should not cost them the connection.
SMALL_BODY_BYTES = 64 << 10


def closing_where_early(app: Any, cycle: RequestResponseCycle, close_after_body: Callable[[], None]) -> Any:
    """Wrap `app` for the one request of `cycle`. An answer gets `Connection: close` if it comes before the end of a
    body that is large, chunked, or waits for `100 Continue`. `close_after_body` is then called; uvicorn itself would
    close at once."""

    async def closing(scope: Any, receive: Any, send: Any) -> None:
        async def send_start(message: Any) -> None:
            if cycle.waiting_for_100_continue or _length(scope) > SMALL_BODY_BYTES:
                cycle.keep_alive = False
            await send(message)
            if not cycle.keep_alive:
                cycle.keep_alive = True  # the guard closes
                close_after_body()

        def send_early(message: Any) -> Awaitable[None]:  # no coroutine of its own: streams send for each token
            is_early = message["type"] == "http.response.start" and cycle.more_body
            return send_start(message) if is_early else send(message)

        await app(scope, receive, send_early)

    return closing


def _length(scope: Any) -> float:
    """The announced length of the body; infinity for a chunked one."""
    found = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(found[0]) if found else float("inf")
