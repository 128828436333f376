"""The messages about calls: an assistant's `tool_calls` and the `tool` messages that answer them.

Checks them and brings them into the shape that a template needs. Messages are dicts in the form for chat templates.
Called by the bodies' validators (`parse_calls`) and by `plan`.
"""

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.tools.definitions import MessageCall, fail

MAX_CALLS = 128  # of one message
MAX_ID_CHARS = 256
MAX_ARGUMENT_PARTS = 65536  # commas, colons and brackets: a parser holds the interpreter's lock while it reads them
_MAX_FUNCTION_NAME_CHARS = 256  # of an earlier call, whose tool may come from another server
_MISTRAL_ID_CHARS = 9
_ALPHANUMERIC = string.ascii_letters + string.digits

Message = dict[str, Any]


def parse_calls(value: object) -> tuple[MessageCall, ...]:
    """A message's `tool_calls`. Raises PydanticCustomError. The arguments must be a JSON object."""
    calls = [] if value is None else value
    if not isinstance(calls, list):
        raise fail("tool_calls must be a list of calls of type function")
    if len(calls) > MAX_CALLS:
        raise fail(f"tool_calls may have at most {MAX_CALLS} calls")
    parsed = tuple(_call(call, f"tool_calls[{index}]") for index, call in enumerate(calls))
    if len({call.id for call in parsed}) != len(parsed):
        raise fail("tool_calls has two calls with the same id")
    return parsed


def _call(value: object, place: str) -> MessageCall:
    if not isinstance(value, dict) or value.get("type", "function") not in ("function", None):
        raise fail(f"{place}: only calls of type function are supported")
    function = value.get("function")
    if not isinstance(function, dict):
        raise fail(f"{place}.function must be an object with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= _MAX_FUNCTION_NAME_CHARS:
        raise fail(f"{place}.function.name must be a text of 1 to {_MAX_FUNCTION_NAME_CHARS} characters")
    call_id = parse_id(value.get("id"), f"{place}.id")
    if call_id is None:
        raise fail(f"{place}.id is missing")
    return MessageCall(call_id, name, _arguments(function.get("arguments"), f"{place}.function.arguments"))


def parse_id(value: object, place: str) -> str | None:
    """A call's id; None if there is none. place: the field that errors name. Raises PydanticCustomError."""
    if value is not None and (not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARS):
        raise fail(f"{place} must be a text of 1 to {MAX_ID_CHARS} characters")
    return value


def _arguments(value: object, place: str) -> Mapping[str, Any]:
    """The arguments of a call: the JSON text of an object, an object itself, or none."""
    arguments = {} if value is None or value == "" else value
    if isinstance(arguments, str):
        if sum(map(arguments.count, ",:[{")) > MAX_ARGUMENT_PARTS:
            raise fail(f"{place} may have at most {MAX_ARGUMENT_PARTS} commas, colons and brackets")
        try:
            arguments = from_json(arguments, allow_inf_nan=False)
        except ValueError:
            raise fail(f"{place} must be valid JSON: chat templates take it apart") from None
    if not isinstance(arguments, dict):
        raise fail(f"{place} must be JSON of an object")
    return arguments


def check_history(messages: Sequence[Message]) -> list[Message]:
    """The messages; each `tool` message gets the name and id of the call that it answers.

    Raises a 400 for a `tool` message that answers no call of an earlier assistant message, or a call that was answered
    before. Without `tool_call_id` it answers the only open call. Calls may stay unanswered.
    """
    open_calls: dict[str, str] = {}  # id → name
    checked = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            open_calls |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        elif message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if call_id is None and len(open_calls) == 1:
                (call_id,) = open_calls
            if call_id is None:
                raise bad_request("a message of the role tool needs tool_call_id", f"messages[{index}]")
            if call_id not in open_calls:
                text = (
                    "a message of the role tool must answer a call of an earlier assistant message (its tool_calls) by "
                    "its id, and each call once"
                )
                raise bad_request(text, f"messages[{index}].tool_call_id")
            name = message.get("name") or open_calls[call_id]
            message = {**message, "tool_call_id": call_id, "name": name}
            del open_calls[call_id]
        checked.append(message)
    return checked


def one_call_a_message(messages: Sequence[Message]) -> list[Message]:
    """The messages with at most one call each, followed by its answer: some templates take only one call."""
    result: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            result.append(message)
            continue
        answers: list[Message] = []
        while position < len(messages) and messages[position]["role"] == "tool":
            answers.append(messages[position])
            position += 1
        for index, call in enumerate(calls):
            content = message["content"] if index == 0 else ""
            result.append({**message, "content": content, "tool_calls": [call]})
            result += [answer for answer in answers if answer["tool_call_id"] == call["id"]]
        ids = {call["id"] for call in calls}
        result += [answer for answer in answers if answer["tool_call_id"] not in ids]
    return result


def with_mistral_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of nine letters and digits, which Mistral's templates insist on."""

    def renamed(message: Message) -> Message:
        if calls := message.get("tool_calls"):
            return {**message, "tool_calls": [{**call, "id": mistral_id(call["id"])} for call in calls]}
        if message["role"] == "tool":
            return {**message, "tool_call_id": mistral_id(message["tool_call_id"])}
        return message

    return [renamed(message) for message in messages]


def mistral_id(call_id: str) -> str:
    """An id of nine letters and digits: the given one if it has that form, otherwise one that depends only on it."""
    if len(call_id) == _MISTRAL_ID_CHARS and call_id.isascii() and call_id.isalnum():
        return call_id
    digest = hashlib.sha256(call_id.encode("utf-8", "replace")).digest()
    return "".join(_ALPHANUMERIC[byte % len(_ALPHANUMERIC)] for byte in digest[:_MISTRAL_ID_CHARS])


def arguments_json(call: Mapping[str, Any]) -> str:
    """A call's arguments as JSON, as models write them."""
    return json.dumps(call["function"]["arguments"], ensure_ascii=False)
