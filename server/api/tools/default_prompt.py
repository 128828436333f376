"""Writes tools into the messages, for chat templates that leave them out.

The system message gets Hermes' `<tools>` text, earlier calls are written in the format, and answers of tools become a
user message with `<tool_response>` blocks. All of it is text: control tokens in it stay text. Called by `plan`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from guanaco.server.api.tools.formats.base import CallFormat
from guanaco.server.api.tools.history import Message, arguments_json

_INTRODUCTION = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""


def tools_text(tools: Sequence[Mapping[str, Any]], call_format: CallFormat) -> str:
    """The text that describes the tools to the model."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = call_format.written([("<function-name>", "<args-json-object>")])
    example = example.replace('"<function-name>"', "<function-name>")
    return f"{_INTRODUCTION}{signatures}\n</tools>\n\n{call_format.instruction}\n{example}"


def with_tools_text(messages: Sequence[Message], text: str, *, takes_system: bool) -> list[Message]:
    """The messages with `text` added: to the system message, in a new system message, or before the first question if
    the template takes no system message."""
    first = messages[0]
    if first["role"] == "system":
        content = f"{first['content']}\n\n{text}" if first["content"] else text
        return [{**first, "content": content}, *messages[1:]]
    if takes_system:
        return [{"role": "system", "content": text}, *messages]
    index = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if index is None:
        return [{"role": "user", "content": text}, *messages]
    user = messages[index]
    return [*messages[:index], {**user, "content": f"{text}\n\n{user['content']}"}, *messages[index + 1 :]]


def with_calls_as_text(messages: Sequence[Message], call_format: CallFormat) -> list[Message]:
    """The messages with calls and answers of tools as plain text, so that they have only roles that all templates know.

    Answers in a row become one user message, joined with a user message behind them, so that roles still alternate.
    """
    result: list[Message] = []
    joins = False  # the last message of the result holds answers
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant" and (calls := message.get("tool_calls")):
            written = call_format.written([(call["function"]["name"], arguments_json(call)) for call in calls])
            content = f"{content}\n{written}" if content else written
        elif role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if joins and role == "user":
            result[-1] = {"role": role, "content": f"{result[-1]['content']}\n{content}"}
        else:
            result.append({"role": role, "content": content})
        joins = message["role"] == "tool"
    return result
