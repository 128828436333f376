"""From a Messages body to a conversation in chat's shape.

Knows the blocks that messages may hold; what a conversation becomes is `conversation`'s. Called by `routes`.
"""

from collections.abc import Mapping
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.conversation import chat_body
from guanaco.server.api.generation.protocol import ChatBody
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.messages.protocol import CountBody, MessagesBody

# Chat's names of fields → ours, where they are others.
NAMES: Mapping[str, str] = {"messages": "messages", "stop": "stop_sequences"}
_ROLES = ("user", "assistant", "system")
_SAME = ("model", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "adapters", "cache_salt")
# An assistant's thoughts before an answer are no part of the conversation that goes on.
_LEFT_OUT = ("thinking", "redacted_thinking")


def conversation(body: CountBody, data: Mapping[str, Any]) -> ChatBody:
    """The body as chat's. data: the same as the client sent it. 400 for blocks that aren't supported."""
    fields: dict[str, Any] = {name: data[name] for name in _SAME if name in data}
    fields["messages"] = _messages(body)
    if isinstance(body, MessagesBody):
        fields["max_tokens"] = body.max_tokens
        fields["stop"] = list(body.stop_sequences)
        fields["stream"] = body.stream
        fields["user"] = None if body.metadata is None else body.metadata.user_id
    return chat_body(fields, NAMES)


def _messages(body: CountBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if system := _text(body.system, "system"):
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_request(f"{at}: each message must be an object with role and content", at)
        role = message.get("role")
        if role not in _ROLES:
            raise bad_request(f"{at}.role must be user, assistant or system", f"{at}.role")
        if "content" not in message:
            raise bad_request(f"{at}.content is missing", f"{at}.content", ErrorCode.MISSING_REQUIRED_PARAMETER)
        text = _text(message["content"], f"{at}.content", is_answer=role == "assistant")
        if messages and messages[-1]["role"] == role != "system":  # two turns of one side are one turn
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": role, "content": text})
    if messages[-1]["role"] == "assistant":
        text = "an answer can't be continued: the last message must not come from the assistant"
        raise bad_request(text, "messages", ErrorCode.UNSUPPORTED_PARAMETER)
    return messages


def _text(content: object, at: str, *, is_answer: bool = False) -> str:
    """The text of a content: a string, or blocks, which become one text with a line for each."""
    if content is None and at == "system":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{at} must be a string or a list of blocks", at, ErrorCode.INVALID_TYPE)
    texts = []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if is_answer and kind in _LEFT_OUT:
            continue
        if kind != "text":
            raise _unsupported_block(f"{at}[{index}]")
        text = block.get("text")
        if not isinstance(text, str):
            raise bad_request(f"{at}[{index}].text must be a string", f"{at}[{index}].text", ErrorCode.INVALID_TYPE)
        texts.append(text)
    return "\n".join(texts)


def _unsupported_block(at: str) -> ApiError:
    text = f"{at}: only blocks of type text are supported: no images, documents or results of server tools"
    return bad_request(text, at, ErrorCode.UNSUPPORTED_PARAMETER)
