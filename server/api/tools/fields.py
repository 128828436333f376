"""Pydantic field types for tools, choices and calls, with their OpenAPI schemas. `definitions` and `history` check
them.

Used by the bodies in `generation.protocol`.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from guanaco.server.api.tools.definitions import (
    MAX_NAME_CHARS,
    MAX_TOOLS,
    MessageCall,
    Tool,
    ToolChoice,
    parse_tool_choice,
    parse_tools,
)
from guanaco.server.api.tools.history import parse_calls, parse_id


def _schema(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema(schema)


_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": MAX_NAME_CHARS},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["name"],
}
_CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}
Tools = Annotated[
    tuple[Tool, ...],
    BeforeValidator(parse_tools),
    _schema(
        type=["array", "null"],
        maxItems=MAX_TOOLS,
        items={
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _FUNCTION_SCHEMA},
            "required": ["type", "function"],
        },
    ),
]
ToolChoiceField = Annotated[
    ToolChoice | None,
    BeforeValidator(parse_tool_choice),
    _schema(anyOf=[{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]),
]
ToolCalls = Annotated[
    tuple[MessageCall, ...], BeforeValidator(parse_calls), _schema(type=["array", "null"], items=_CALL_SCHEMA)
]
ToolCallId = Annotated[str | None, BeforeValidator(lambda value: parse_id(value, "it"))]
