"""A clock that stands still while the whole process does: SIGSTOP, a paused container, a machine that is suspended.

Such a stop makes nothing late: a step that was under way does not count as stuck, and no request has waited longer.
Deadlines of requests and connections count by this clock. Used by the engine, its watchdog and the HTTP side.
"""

import asyncio
import threading
import time
from collections.abc import Callable

_TICK_SECONDS = 0.25
# If nobody has read the clock for this long, the process was stopped: the ticking thread reads it four times a second.
_STOP_SECONDS = 1.0


class AwakeClock:
    """Seconds of the monotonic clock, less those in which this process was stopped. Safe from any thread.

    Sees stops from the first `start` on; before that it is the monotonic clock.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._last_look: float | None = None  # the clock at the last reading; None: `start` was not called yet
        self._stopped_seconds = 0.0

    def now(self) -> float:
        with self._lock:
            seconds = self._monotonic()
            if self._last_look is not None:
                if (gap := seconds - self._last_look) > _STOP_SECONDS:
                    self._stopped_seconds += gap - _TICK_SECONDS
                self._last_look = seconds
            return seconds - self._stopped_seconds

    def start(self) -> None:
        """Read the clock regularly, on a daemon thread. A second call does nothing."""
        with self._lock:
            if self._last_look is not None:
                return
            self._last_look = self._monotonic()
        threading.Thread(target=self._tick, name="guanaco-clock", daemon=True).start()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self.now()


CLOCK = AwakeClock()


def awake_seconds() -> float:
    """This process's clock for deadlines and durations."""
    return CLOCK.now()


class AwakeTimer:
    """`loop.call_later` by an awake clock: after the process was stopped, it waits for the seconds that were left."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], object], clock: AwakeClock = CLOCK
    ) -> None:
        self._loop = loop
        self._callback = callback
        self._clock = clock
        self._due = clock.now() + seconds
        self._handle = loop.call_later(seconds, self._fire)

    def cancel(self) -> None:
        self._handle.cancel()

    def _fire(self) -> None:
        left = self._due - self._clock.now()
        if left > 0.001:  # event loops may call a little early
            self._handle = self._loop.call_later(left, self._fire)
        else:
            self._callback()
