"""Checks and limits tools and the choice between them, in the shape of OpenAI's chat API.

The functions raise PydanticCustomError; its text names the field below the tool and holds nothing that the client sent.
Called by the bodies' validators and by other routes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128
MAX_NAME_CHARS = 64
MAX_DESCRIPTION_CHARS = 32768
MAX_PARAMETERS_BYTES = 65536  # of one tool's schema, as JSON
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NAME_RULE = f"must have 1 to {MAX_NAME_CHARS} characters: letters, digits, _ and -"

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Tool:
    """One function that may be called."""

    name: str
    parameters: Mapping[str, Any]  # a JSON schema
    strict: bool
    shown: Mapping[str, Any]  # for the chat template: as the client sent it, without nulls and `strict`


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model may, must or must not call, and which functions. names None: all."""

    mode: Mode
    names: tuple[str, ...] | None = None
    is_named: bool = False  # this one function has to be called


def fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", message)


def parse_tools(value: object) -> tuple[Tool, ...]:
    """The tools in the field `tools`. An empty list and null mean none."""
    tools = [] if value is None else value
    if not isinstance(tools, list):
        raise fail("give a list of tools of type function")
    if len(tools) > MAX_TOOLS:
        raise fail(f"at most {MAX_TOOLS} tools")
    parsed = tuple(_tool(tool, index) for index, tool in enumerate(tools))
    names = [tool.name for tool in parsed]
    if len(set(names)) != len(names):
        index = next(i for i, name in enumerate(names) if name in names[:i])
        raise fail(f"tool {index} has the name of another one: each name may be given once")
    return parsed


def _tool(value: object, index: int) -> Tool:
    if not isinstance(value, dict) or value.get("type") != "function":
        raise fail(f"tool {index}: only tools of type function are supported")
    function = value.get("function")
    if not isinstance(function, dict):
        raise fail(f"tool {index}: function must be an object with name, description and parameters")
    name, description, strict = function.get("name"), function.get("description"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise fail(f"tool {index}: function.name {_NAME_RULE}")
    if description is not None and (not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARS):
        raise fail(f"tool {index}: function.description must be a text of at most {MAX_DESCRIPTION_CHARS} characters")
    if strict is not None and not isinstance(strict, bool):
        raise fail(f"tool {index}: function.strict must be true or false")
    parameters = _parameters(function.get("parameters"), index)
    known = {"name": name, "description": description, "parameters": parameters}
    order = [key for key in function if key in known and known[key] is not None]
    order += [] if "parameters" in order else ["parameters"]
    shown = {"type": "function", "function": {key: known[key] for key in order}}
    return Tool(name, parameters, bool(strict), shown)


def _parameters(value: object, index: int) -> Mapping[str, Any]:
    """The JSON schema of a function's parameters. If it is missing or empty, the function takes none, as in OpenAI's
    API; templates then get a schema that says so."""
    if value is None or value == {}:
        return NO_PARAMETERS
    if not isinstance(value, dict):
        raise fail(f"tool {index}: function.parameters must be a JSON schema: an object")
    if value.get("type", "object") != "object":
        raise fail(f"tool {index}: function.parameters must be a schema of type object")
    try:
        size = len(orjson.dumps(value))
    except (TypeError, ValueError):  # too deep, or an integer beyond 64 bits
        raise fail(
            f"tool {index}: function.parameters is nested too deeply, or has a number that is too large"
        ) from None
    if size > MAX_PARAMETERS_BYTES:
        raise fail(f"tool {index}: function.parameters may have at most {MAX_PARAMETERS_BYTES} bytes of JSON")
    return value


def parse_tool_choice(value: object) -> ToolChoice | None:
    """The field `tool_choice`; None if it isn't given. `plan` checks whether its names are tools."""
    if value is None:
        return None
    if value in ("none", "auto", "required") and isinstance(value, str):
        return ToolChoice(value)
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "function":
        return ToolChoice("required", (_named(value),), is_named=True)
    if isinstance(value, dict) and kind == "allowed_tools":
        return _allowed(value)
    raise fail(
        'give "none", "auto", "required", {"type": "function", "function": {"name": NAME}}, '
        'or {"type": "allowed_tools", "allowed_tools": {"mode": MODE, "tools": TOOLS}}'
    )


def _named(value: Mapping[str, Any]) -> str:
    """The name in {"type": "function", "function": {"name": …}}; the Responses API's flat form is the same."""
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise fail("function.name must be the name of a tool")
    return name


def _allowed(value: Mapping[str, Any]) -> ToolChoice:
    allowed = value.get("allowed_tools", value)
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    if not isinstance(allowed, dict) or mode not in ("auto", "required"):
        raise fail('allowed_tools.mode must be "auto" or "required"')
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise fail(f"allowed_tools.tools must be a list of 1 to {MAX_TOOLS} tools by name")
    if not all(isinstance(tool, dict) and tool.get("type") == "function" for tool in tools):
        raise fail("allowed_tools.tools may only have tools of type function")
    return ToolChoice(mode, tuple(dict.fromkeys(_named(tool) for tool in tools)))


@dataclass(frozen=True)
class MessageCall:
    """A call in an earlier assistant message."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        return len(self.name.encode()) + len(json.dumps(self.arguments))

    def shown(self) -> dict[str, Any]:
        """The call for chat templates, with the arguments as an object, as in transformers."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
