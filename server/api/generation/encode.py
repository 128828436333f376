"""The JSON of answers and of their events. Large answers are encoded piece by piece, since the encoder holds the
interpreter's lock during a call.

`encode` runs on worker threads. Between two pieces the event loop can run.
"""

from collections.abc import Iterator
from typing import Any

import orjson

# How many items of a list are encoded in one call. A token with its 20 alternatives takes 2 kB.
_ITEMS = 256
# How deep lists are cut: answer, choices, choice, log-probabilities, content.
_DEPTH = 5


def encode(value: Any, depth: int = _DEPTH) -> bytes:
    """The same bytes as `orjson.dumps(value)`."""
    return b"".join(pieces(value, depth))


def pieces(value: Any, depth: int = _DEPTH) -> Iterator[bytes]:
    """The same bytes, each piece made when it is asked for. depth: how deep lists are looked for."""
    if depth and type(value) is dict:
        for place, (name, item) in enumerate(value.items()):
            yield (b"," if place else b"{") + orjson.dumps(name) + b":"
            yield from pieces(item, depth - 1)
        yield b"}" if value else b"{}"
    elif depth and type(value) is list:
        if len(value) > _ITEMS:
            for place in range(0, len(value), _ITEMS):
                yield (b"," if place else b"[") + orjson.dumps(value[place : place + _ITEMS])[1:-1]
        else:
            for place, item in enumerate(value):
                yield b"," if place else b"["
                yield from pieces(item, depth - 1)
        yield b"]" if value else b"[]"
    else:
        yield orjson.dumps(value)


def event(data: object) -> bytes:
    """One complete server-sent event. It ends with LF, since vLLM's clients can't read CRLF."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """As `event`, with the data's `type` as the event's name: Anthropic's client skips events without a name."""
    return _name(data) + event(data)


def named_event_pieces(data: dict[str, Any], depth: int) -> Iterator[bytes]:
    """As `named_event`, piece by piece, for a large event. depth: as in `pieces`."""
    yield _name(data) + b"data: "
    yield from pieces(data, depth)
    yield b"\n\n"


def _name(data: dict[str, Any]) -> bytes:
    name: str = data["type"]
    return b"event: " + name.encode() + b"\n"
