"""The items of a response's input: read, kept in OpenAI's shape, and turned into messages in chat's shape.

Knows the kinds of items. `generation.conversation` then makes the prompt. Called by `routes` on worker threads.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.protocol import MAX_MESSAGES
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.responses.protocol import MAX_ID_CHARS

Item = dict[str, Any]
Message = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")
_ID = re.compile(rf"[A-Za-z0-9_\-]{{1,{MAX_ID_CHARS}}}")


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(24)


def read_input(value: object, kept: Callable[[], Mapping[str, bytes]]) -> list[Item]:
    """The input as items, each complete and with an id. Raises a 400 for unsupported kinds of items and parts.

    kept: returns the items that references may name: id → JSON of a stored item.
    """
    if isinstance(value, str):
        return [_message("user", value, {})]
    if not isinstance(value, list) or not value:
        raise bad_request("input must be a string or a list of items, and not an empty list", "input")
    if len(value) > MAX_MESSAGES:
        raise bad_request(f"input may have at most {MAX_MESSAGES} items", "input")
    items = []
    by_id: Mapping[str, bytes] | None = None  # read once, when the first reference needs it
    for index, item in enumerate(value):
        at = f"input[{index}]"
        if not isinstance(item, dict):
            raise bad_request(f"{at} must be an object", at, ErrorCode.INVALID_TYPE)
        if item.get("type") == "item_reference":
            by_id = kept() if by_id is None else by_id
            items.append(_referenced(item, at, by_id))
        elif (read := _read_item(item, at)) is not None:
            items.append(read)
    if not items:
        raise bad_request("input has no message", "input")
    return items


def _referenced(item: Mapping[str, Any], at: str, by_id: Mapping[str, bytes]) -> Item:
    found = by_id.get(item["id"]) if isinstance(item.get("id"), str) else None
    if found is None:
        text = f"{at}.id must be the id of an item of a response that is kept: send the item itself instead"
        raise bad_request(text, f"{at}.id", ErrorCode.PREVIOUS_RESPONSE_NOT_FOUND)
    read: Item = orjson.loads(found)
    return read


def _read_item(item: Mapping[str, Any], at: str) -> Item | None:
    kind = item.get("type") or "message"
    if kind == "reasoning":
        return None  # a model's thoughts before an earlier answer are left out of the conversation
    if kind == "function_call":
        return _call(item, at)
    if kind == "function_call_output":
        return _output(item, at)
    if kind != "message":
        text = f"{at}.type: only items of type message, function_call and function_call_output are supported"
        raise bad_request(text, f"{at}.type", ErrorCode.UNSUPPORTED_PARAMETER)
    if item.get("role") not in _ROLES:
        raise bad_request(f"{at}.role must be user, assistant, system or developer", f"{at}.role")
    if "content" not in item:
        raise bad_request(f"{at}.content is missing", f"{at}.content", ErrorCode.MISSING_REQUIRED_PARAMETER)
    return _message(item["role"], _text(item["content"], f"{at}.content"), item)


def _call(item: Mapping[str, Any], at: str) -> Item:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise bad_request(f"{at}.{name} must be a string", f"{at}.{name}", ErrorCode.INVALID_TYPE)
    return {
        "id": _id(item, "fc_"),
        "type": "function_call",
        "status": "completed",
        **{name: item[name] for name in ("call_id", "name", "arguments")},
    }


def _output(item: Mapping[str, Any], at: str) -> Item:
    call_id = item.get("call_id")
    if not isinstance(call_id, str):
        raise bad_request(f"{at}.call_id must be a string", f"{at}.call_id", ErrorCode.INVALID_TYPE)
    text = _text(item.get("output"), f"{at}.output")
    kind = "function_call_output"
    return {"id": _id(item, "fco_"), "type": kind, "status": "completed", "call_id": call_id, "output": text}


def _id(item: Mapping[str, Any], prefix: str) -> str:
    """The item's own id if it is well formed, otherwise a new one."""
    given = item.get("id")
    return given if isinstance(given, str) and _ID.fullmatch(given) else new_id(prefix)


def _message(role: str, text: str, item: Mapping[str, Any]) -> Item:
    part: Item = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": _id(item, "msg_"),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": [part],
    }


def _text(content: object, at: str) -> str:
    """The text of a content: a string, or parts, which are joined with a new line between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{at} must be a string or a list of parts", at, ErrorCode.INVALID_TYPE)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise _unsupported_part(f"{at}[{index}]")
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{at}[{index}].text must be a string", f"{at}[{index}].text", ErrorCode.INVALID_TYPE)
        texts.append(part["text"])
    return "\n".join(texts)


def _unsupported_part(at: str) -> ApiError:
    text = f"{at}: only parts with text are supported (input_text, output_text): no images, audio or files"
    return bad_request(text, at, ErrorCode.UNSUPPORTED_PARAMETER)


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[Message]:
    """Items as chat messages, after the instructions. Raises a 400 for an output without a call before it.

    System messages directly after the first one, which may be the instructions, are joined to it, since templates take
    only one. Calls become part of the assistant's message before them.
    """
    messages: list[Message] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    open_calls: set[str] = set()
    for item in items:
        last = messages[-1] if messages else None
        if item["type"] == "function_call":
            open_calls.add(item["call_id"])
            if last is None or last["role"] != "assistant":
                last = {"role": "assistant", "content": None}
                messages.append(last)
            last.setdefault("tool_calls", []).append(_chat_call(item))
        elif item["type"] == "function_call_output":
            if item["call_id"] not in open_calls:
                text = "input has a function_call_output whose call_id is that of no function_call before it"
                raise bad_request(text, "input")
            open_calls.remove(item["call_id"])
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            text = "\n".join(part["text"] for part in item["content"])
            if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
                messages[0]["content"] += "\n" + text
            else:
                messages.append({"role": role, "content": text})
    return messages


def _chat_call(item: Item) -> Message:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def chat_tools(value: object) -> list[Message]:
    """`tools` in chat's shape. Raises a 400 for tools that the server would have to run."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad_request("tools must be a list", "tools", ErrorCode.INVALID_TYPE)
    tools = []
    for index, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            text = f"tools[{index}]: only tools of type function are supported, which the client runs itself"
            raise bad_request(text, f"tools[{index}]", ErrorCode.UNSUPPORTED_PARAMETER)
        function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
        tools.append({"type": "function", "function": function})
    return tools


def chat_format(text_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """`text.format` as chat's response_format, in which the schema is one level deeper."""
    if text_format is None or text_format.get("type") != "json_schema":
        return text_format
    return {"type": "json_schema", "json_schema": {name: text_format[name] for name in text_format if name != "type"}}
