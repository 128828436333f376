"""Finds out which parts of tool use a chat template writes itself, by rendering a conversation with more and more
parts.

The conversation has unique names and values; those that appear in the output were written. Called by `chat_template`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]  # "" if it refuses

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A probe."}},
            "required": ["probe_key"],
        },
    },
}
_USER = {"role": "user", "content": "probe"}
_IDS = ("probe0001", "probe0002")  # nine characters: Mistral's templates take no other length


def _call(index: int) -> dict[str, Any]:
    function = {"name": "probe_tool", "arguments": {"probe_key": f"probe_value_{index}"}}
    return {"id": _IDS[index], "type": "function", "function": function}


def _result(index: int) -> dict[str, Any]:
    content = f"probe_result_{index}"
    return {"role": "tool", "name": "probe_tool", "tool_call_id": _IDS[index], "content": content}


@dataclass(frozen=True)
class ToolSupport:
    """Which parts of a conversation with tools the template writes into the prompt."""

    tools: bool  # the list of functions
    calls: bool  # an assistant message's calls
    results: bool  # messages of the role tool
    many_calls: bool  # several calls in one message
    system: bool  # messages of the role system


def find_tool_support(render: Render) -> ToolSupport:
    """Find the support of the template behind `render`. An exception of `render` ends the trial."""
    tools = "probe_tool" in render([_USER], [_TOOL])
    given = [_TOOL] if tools else None

    def conversation(count: int) -> str:
        calls = [_call(index) for index in range(count)]
        results = [_result(index) for index in range(count)]
        return render([_USER, {"role": "assistant", "content": "", "tool_calls": calls}, *results], given)

    one, two = conversation(1), conversation(2)
    return ToolSupport(
        tools=tools,
        calls="probe_value_0" in one,
        results="probe_result_0" in one,
        many_calls=all(text in two for text in ("probe_value_0", "probe_value_1", "probe_result_0", "probe_result_1")),
        system="probe_system" in render([{"role": "system", "content": "probe_system"}, _USER], None),
    )
