"""Whether the server is draining, and how many requests it has open: flags and counters that the HTTP side shares.

Knows no HTTP and no engine. The process (`server.py`) sets the flags; the gate, the health routes and others read them.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lifecycle:
    """Lives on the event loop; only `draining` may be set from elsewhere (a signal handler)."""

    def __init__(self) -> None:
        self.draining = False  # the readiness check fails, so that routers choose another server
        self.end_wanted = False  # an operator has asked over HTTP for a drain, as SIGTERM does
        self.refusing = False  # new work is refused
        self.num_open = 0  # HTTP requests that are being answered
        self.num_admitted = 0  # those of them that are being prepared or in the engine
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    @contextmanager
    def open_request(self) -> Iterator[None]:
        self.num_open += 1
        self._all_closed.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._all_closed.set()

    async def wait_all_closed(self, timeout_seconds: float) -> bool:
        """Wait until no request is open; False if some still are after `timeout_seconds`."""
        try:
            await asyncio.wait_for(self._all_closed.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True


class Admission:
    """One request's place among those that are being prepared or in the engine, and the things that it holds meanwhile.
    `release` may be called more than once, on the event loop."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle: Lifecycle | None = lifecycle
        self._lock = threading.Lock()
        self._held: list[Callable[[], None]] | None = []
        lifecycle.num_admitted += 1

    def on_release(self, give_back: Callable[[], None]) -> None:
        """Call `give_back` when the place is released. Any thread may call this. After the release it is called at
        once: a worker may still prepare a request whose client has left."""
        with self._lock:
            if self._held is not None:
                self._held.append(give_back)
                return
        give_back()

    def release(self) -> None:
        if self._lifecycle is not None:
            self._lifecycle.num_admitted -= 1
            self._lifecycle = None
        with self._lock:
            held, self._held = self._held, None
        for give_back in held or ():
            give_back()
