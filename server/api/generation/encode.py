"""JSON of answers and of their events. Large ones are written piece by piece: the encoder holds the interpreter's lock
for all of what it is given.

Doesn't know what the answers say. `encode` runs on worker threads; between two pieces the event loop gets its turn.
"""

from typing import Any

import orjson

# Items of a list that are encoded in one go: a token with its 20 alternatives comes to 2 kB.
_ITEMS = 256
# How deep a list is looked for: answer, choices, choice, log-probabilities, content.
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
    """One server-sent event, complete. LF: vLLM's clients can't split what ends with CRLF."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """The same with the event's name, which is the data's `type`: Anthropic's client skips events without one."""
    name: str = data["type"]
    return b"event: " + name.encode() + b"\n" + event(data)
