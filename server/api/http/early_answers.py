"""Answers that are given before the request's body is there, such as 401, 413 and 429.

The rest of the body has to be read and thrown away: it would be taken for the next request, and closing at once would
reset the connection before the client has read the answer. So the connection is closed once the rest has come, within
the guard's bounds of time and bytes. It is kept only where little is left that the client will surely send. Used by
`guard`.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

# A body that was announced with so many bytes at most is waited for, and the connection goes on. httpx and others send
# head and body apart, and a refused chat must not cost its client the connection.
SMALL_BODY_BYTES = 64 << 10


def closing_where_early(app: Any, cycle: RequestResponseCycle, close_after_body: Callable[[], None]) -> Any:
    """`app` for the one request of `cycle`. Where its answer comes early and much of the body is missing, the answer
    says `Connection: close`, and `close_after_body` is called in place of uvicorn's closing at once."""

    async def closing(scope: Any, receive: Any, send: Any) -> None:
        async def send_early(message: Any) -> None:
            if message["type"] != "http.response.start" or not cycle.more_body:
                await send(message)
                return
            if cycle.waiting_for_100_continue or _length(scope) > SMALL_BODY_BYTES:
                cycle.keep_alive = False
            await send(message)
            if not cycle.keep_alive:
                cycle.keep_alive = True  # the guard closes
                close_after_body()

        await app(scope, receive, send_early)

    return closing


def _length(scope: Any) -> float:
    """The announced length of the body; without end where it comes in chunks."""
    found = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(found[0]) if found else float("inf")
