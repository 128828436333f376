"""The JSON of answers and of their events. Large answers are encoded piece by piece, since the encoder holds the
interpreter's lock during a call.

`encode` runs on worker threads. Between two pieces the event loop can run.
"""

from typing import Any

import orjson

# How many items of a list are encoded in one call. A token with its 20 alternatives takes 2 kB.
_ITEMS = 256
# How deep lists are cut: answer, choices, choice, log-probabilities, content.
_DEPTH = 5


def encode(value: Any, depth: int = _DEPTH) -> bytes:
    """The same bytes as `orjson.dumps(value)`."""
    if depth and type(value) is dict:
        fields = (orjson.dumps(name) + b":" + encode(item, depth - 1) for name, item in value.items())
        return b"{" + b",".join(fields) + b"}"
    if depth and type(value) is list:
        if len(value) <= _ITEMS:
            return b"[" + b",".join(encode(item, depth - 1) for item in value) + b"]"
        pieces = (orjson.dumps(value[i : i + _ITEMS])[1:-1] for i in range(0, len(value), _ITEMS))
        return b"[" + b",".join(pieces) + b"]"
    return orjson.dumps(value)


def event(data: object) -> bytes:
    """One complete server-sent event. It ends with LF, since vLLM's clients can't read CRLF."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """As `event`, with the data's `type` as the event's name: Anthropic's client skips events without a name."""
    name: str = data["type"]
    return b"event: " + name.encode() + b"\n" + event(data)
