"""Progress of slow work at start: a bar on a terminal, otherwise a line every few seconds.

Called when a server starts, by `quantize` and by training.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]  # (what is done, units of it done, units in all; 0: not known)

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def reporting(console: Console, title: str, watch: Report | None = None) -> Iterator[Report]:
    """Yield a function to call with (what, done, in all), any number of times. Nothing is shown before the first
    call.

    watch: gets (title, done, in all) of each call, and (title, 0, 0) at once.
    """
    if watch is not None:
        watch(title, 0, 0)
    with _shown(console, title) as show:
        if watch is None:
            yield show
            return

        def report(what: str, done: int, total: int) -> None:
            show(what, done, total)
            watch(title, done, total)

        yield report


@contextmanager
def _shown(console: Console, title: str) -> Iterator[Report]:
    if not console.is_terminal:
        yield _Lines(console, title)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", visible=False)

        def report(what: str, done: int, total: int) -> None:
            progress.update(
                task, description=what[:40], completed=min(done, total or done), total=total or None, visible=True
            )

        yield report


class _Lines:
    """Writes one line every few seconds, and one at the end."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._next = 0.0
        self._ended = ""  # the work that was last reported as complete, so that it is reported once

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        ends = 0 < total <= done
        if (now >= self._next or ends) and what != self._ended:
            self._next = now + _SECONDS_BETWEEN_LINES
            self._ended = what if ends else ""
            share = f"{min(100, 100 * done // total)} %" if total else ""
            self._console.print(f"{self._title}: {share} {what}".rstrip(), highlight=False, markup=False)
