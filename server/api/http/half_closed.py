"""Tells a client that has only ended its side of the connection from a client that has left.

Both look the same at first, since nothing more arrives. A client that has left answers any data with a reset, and then
the socket has an error. So we write `100 Continue` from time to time, which HTTP/1.1 allows any number of times before
an answer. If the answer has begun, its own bytes do the same. HTTP/1.0 has no such line, so there a client that has
left is noticed only when its answer is written. Used by `guard`.
"""

import asyncio
import socket
from collections.abc import Callable

from guanaco.server.engine.awake_clock import AwakeTimer

_FIRST_SECONDS = 0.05  # most answers without a generation are sent by then
_MOST_SECONDS = 60.0  # between two checks
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfClosedWatch:
    """Checks one half-closed connection at growing intervals, and aborts it when the client has left."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, may_probe: Callable[[], bool]
    ) -> None:
        """may_probe: whether `100 Continue` may be written now."""
        self._loop = loop
        self._transport = transport
        self._may_probe = may_probe
        self._seconds = _FIRST_SECONDS
        self._timer: AwakeTimer | None = None
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._timer = AwakeTimer(self._loop, self._seconds, self._look)
        self._seconds = min(2 * self._seconds, _MOST_SECONDS)

    def _look(self) -> None:
        self._timer = None
        if self._transport.is_closing():
            return
        if _has_error(self._transport):
            self._transport.abort()
            return
        if self._may_probe():
            self._transport.write(_PROBE)
        self._wait()


def _has_error(transport: asyncio.Transport) -> bool:
    sock = transport.get_extra_info("socket")
    return sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
