"""The events of one job: a file to which lines are appended. It is read from its end, so its length does not matter.

An event's id begins with its place in the file, so that the events before it are found without a search. Ids of earlier
versions have no place and are searched for. Knows no job; used by `store`.
"""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from time import time
from typing import Any

from guanaco.server.training.jobs.disk import append_line, is_id
from guanaco.server.training.jobs.records import EVENT, event

_BLOCK_BYTES = 64 << 10
_MAX_PLACE = 16**12


class EventList:
    """One file of events. Only one thread may add at a time; any number may read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Add an event. Raises OSError."""
        place = self._size() % _MAX_PLACE
        made = event(f"{EVENT}-{place:012x}{secrets.token_hex(6)}", int(time()), message, level=level, data=data)
        append_line(self._path, made)

    def latest(self, after: str | None, limit: int) -> list[dict[str, Any]]:
        """At most `limit` events, the latest first. after: the id of an event; only older ones are returned.

        Raises LookupError if there is no event of this id.
        """
        found: list[dict[str, Any]] = []
        end = self._size() if after is None else self._place(after)
        for _, line in self._backwards(end):
            if len(found) >= limit:
                break
            if (content := _object(line)) is not None:
                found.append(content)
        return found

    def _place(self, event_id: str) -> int:
        """Where the line of an event begins. Raises LookupError."""
        if is_id(event_id, EVENT):
            place = int(event_id.removeprefix(f"{EVENT}-")[:12], 16)
            if place < self._size():
                with self._path.open("rb") as file:
                    file.seek(place)
                    start = file.read(1)  # the end of a line that a crash cut is written before the event
                    line = (b"" if start == b"\n" else start) + file.readline()
                if (_object(line) or {}).get("id") == event_id:
                    return place
            for place, line in self._backwards(self._size()):
                if (_object(line) or {}).get("id") == event_id:
                    return place
        raise LookupError(event_id)

    def _backwards(self, end: int) -> Iterator[tuple[int, bytes]]:
        """(place, line) of the lines before a place, the last one first. Holds one block and one line at a time."""
        try:
            with self._path.open("rb") as file:
                rest = b""  # the end of a line whose beginning is in an earlier block
                while end > 0:
                    start = max(0, end - _BLOCK_BYTES)
                    file.seek(start)
                    lines = (file.read(end - start) + rest).split(b"\n")
                    place = start + sum(len(line) + 1 for line in lines)
                    for line in reversed(lines[1:]):
                        place -= len(line) + 1
                        if line:
                            yield place, line
                    rest, end = lines[0], start
                if rest:
                    yield 0, rest
        except OSError:
            return

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
