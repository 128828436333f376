"""A choice's calls in the shapes of OpenAI's chat: `tool_calls` of a message, and the deltas of a stream.

Used by the answers of the routes; knows no HTTP.
"""

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from guanaco.server.api.tools.reader import CallArguments, CallBegins, Content, Event

TOOL_CALLS = "tool_calls"  # the finish reason
_ALPHABET = string.ascii_letters + string.digits
_ID_CHARS = 24


def new_call_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(_ID_CHARS))


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass
class ChoiceCalls:
    """Collects the content and the calls of one choice."""

    contents: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Content(text):
                    self.contents.append(text)
                case CallBegins(_, name):
                    self.calls.append(_Call(new_call_id(), name))
                case CallArguments(index, text):
                    self.calls[index].arguments.append(text)

    @property
    def content(self) -> str | None:
        """The text; None if there are only calls."""
        text = "".join(self.contents)
        return None if self.calls and not text else text

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """A message's `tool_calls`."""
        return [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.arguments)},
            }
            for call in self.calls
        ]


def deltas(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The deltas of a stream, without the role: a call's first one has id and name, the others pieces of arguments."""
    result: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Content(text):
                result.append({"content": text})
            case CallBegins(index, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": new_call_id(), "type": "function", "function": function}
                result.append({"tool_calls": [call]})
            case CallArguments(index, text):
                result.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
    return result
