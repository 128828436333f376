"""The clock of deadlines stands still while the process does."""

import asyncio

from guanaco.server.engine.awake_clock import AwakeClock, AwakeTimer


class Time:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def watched(time: Time) -> AwakeClock:
    """As after `start`, without its thread."""
    clock = AwakeClock(time)
    clock._last_look = time()
    return clock


def test_time_passes_while_somebody_looks() -> None:
    time = Time()
    clock = watched(time)
    began = clock.now()
    for _ in range(40):
        time.seconds += 0.25
        clock.now()
    assert clock.now() - began == 10.0


def test_a_stop_is_left_out() -> None:
    time = Time()
    clock = watched(time)
    began = clock.now()
    time.seconds += 3600
    assert clock.now() - began == 0.25
    time.seconds += 0.5
    assert clock.now() - began == 0.75


def test_without_a_regular_look_it_is_the_monotonic_clock() -> None:
    time = Time()
    clock = AwakeClock(time)
    began = clock.now()
    time.seconds += 3600
    assert clock.now() - began == 3600


def test_a_timer_waits_for_what_was_left() -> None:
    async def work() -> None:
        time, fired = Time(), []
        clock = watched(time)
        loop = asyncio.get_running_loop()
        timer = AwakeTimer(loop, 30.0, lambda: fired.append("fired"), clock)
        timer._handle.cancel()
        time.seconds += 3600  # the loop's own timer is due: all of this hour the process was stopped
        timer._fire()
        assert not fired
        assert timer._handle.when() - loop.time() > 29
        timer._handle.cancel()
        for _ in range(120):
            time.seconds += 0.25
            clock.now()
        timer._fire()
        assert fired == ["fired"]

    asyncio.run(work())


def test_a_cancelled_timer_does_not_fire() -> None:
    async def work() -> None:
        fired: list[str] = []
        timer = AwakeTimer(asyncio.get_running_loop(), 0.0, lambda: fired.append("fired"))
        timer.cancel()
        await asyncio.sleep(0.01)
        assert not fired

    asyncio.run(work())
