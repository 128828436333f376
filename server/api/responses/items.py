"""The items of a response's input: read, kept in OpenAI's shape, and turned into messages in chat's shape.

Knows the kinds of items; what a conversation becomes is `conversation`'s. Called by `routes` on worker threads.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.protocol import MAX_MESSAGES
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.responses.protocol import MAX_ID_CHARS

Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")
_ID = re.compile(rf"[A-Za-z0-9_\-]{{1,{MAX_ID_CHARS}}}")


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(24)


def read_input(value: object) -> list[Item]:
    """The input as items, each complete and with an id. 400 for kinds of items and parts that aren't supported."""
    if isinstance(value, str):
        return [_message("user", value, {})]
    if not isinstance(value, list) or not value:
        raise bad_request("input must be a string or a list of items, and not an empty list", "input")
    if len(value) > MAX_MESSAGES:
        raise bad_request(f"input may have at most {MAX_MESSAGES} items", "input")
    items = []
    for index, item in enumerate(value):
        at = f"input[{index}]"
        if not isinstance(item, dict):
            raise bad_request(f"{at} must be an object", at, ErrorCode.INVALID_TYPE)
        if (read := _read_item(item, at)) is not None:
            items.append(read)
    if not items:
        raise bad_request("input has no message", "input")
    return items


def _read_item(item: Mapping[str, Any], at: str) -> Item | None:
    kind = item.get("type") or "message"
    if kind == "reasoning":
        return None  # a model's thoughts before an earlier answer are no part of what goes on
    if kind != "message":
        text = f"{at}.type: this type of item is not supported; only messages are"
        raise bad_request(text, f"{at}.type", ErrorCode.UNSUPPORTED_PARAMETER)
    if item.get("role") not in _ROLES:
        raise bad_request(f"{at}.role must be user, assistant, system or developer", f"{at}.role")
    if "content" not in item:
        raise bad_request(f"{at}.content is missing", f"{at}.content", ErrorCode.MISSING_REQUIRED_PARAMETER)
    return _message(item["role"], _text(item["content"], f"{at}.content"), item)


def _message(role: str, text: str, item: Mapping[str, Any]) -> Item:
    given = item.get("id")
    part: Item = {"type": "input_text", "text": text}
    if role == "assistant":
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {
        "id": given if isinstance(given, str) and _ID.fullmatch(given) else new_id("msg_"),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": [part],
    }


def _text(content: object, at: str) -> str:
    """The text of a content: a string, or parts, which become one text with a line for each."""
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


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """Items as messages of a chat, behind the instructions. A system message that follows them goes on with them:
    templates take one."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        role = "system" if item["role"] == "developer" else item["role"]
        text = "\n".join(part["text"] for part in item["content"])
        if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
            messages[0]["content"] += "\n" + text
        else:
            messages.append({"role": role, "content": text})
    return messages
