"""From a Messages body to a conversation in chat's shape.

Knows the blocks that messages may hold. `generation.conversation` then makes the prompt. Called by `routes`.
"""

from collections.abc import Mapping
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.conversation import chat_body
from guanaco.server.api.generation.protocol import ChatBody, SamplingExtensions
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.messages.protocol import CountBody, MessagesBody

# Chat's name of a field → Anthropic's.
NAMES: Mapping[str, str] = {
    "messages": "messages",
    "continue_final_message": "messages",
    "stop": "stop_sequences",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "response_format": "output_config.format",
}
_ROLES = ("user", "assistant", "system")
# Fields with the same name and meaning in chat.
_SAME = ("model", "temperature", "top_p", "top_k", "adapters", *SamplingExtensions.model_fields)
# An assistant's thoughts before an answer are left out of the conversation.
_LEFT_OUT = ("thinking", "redacted_thinking")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

Message = dict[str, Any]


def conversation(body: CountBody, data: Mapping[str, Any]) -> ChatBody:
    """The body in chat's shape. data: the body as the client sent it. Raises a 400 for unsupported blocks.

    If the last message comes from the assistant, the answer continues it.
    """
    fields: dict[str, Any] = {name: data[name] for name in _SAME if name in data}
    fields["messages"] = _messages(body)
    fields["continue_final_message"] = fields["messages"][-1]["role"] == "assistant"
    fields["tools"] = _tools(body.tools)
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesBody):
        fields["max_tokens"] = body.max_tokens
        fields["stop"] = list(body.stop_sequences)
        fields["stream"] = body.stream
        fields["user"] = None if body.metadata is None else body.metadata.user_id
    return chat_body(fields, NAMES)


def _messages(body: CountBody) -> list[Message]:
    messages: list[Message] = []
    calls: set[str] = set()  # ids of calls that have no result yet
    if body.system is not None and (system := _text(body.system, "system")):
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_request(f"{at}: each message must be an object with role and content", at)
        role = message.get("role")
        if role not in _ROLES:
            raise bad_request(f"{at}.role must be user, assistant or system", f"{at}.role")
        if "content" not in message:
            code = ErrorCode.MISSING_REQUIRED_PARAMETER
            raise bad_request(f"{at}.content is missing", f"{at}.content", code)
        for piece in _pieces(role, message["content"], f"{at}.content", calls):
            _append(messages, piece)
    return messages


def _append(messages: list[Message], message: Message) -> None:
    """Append a message. It is merged with the last one if both have the same role."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] in ("system", "tool"):
        messages.append(message)
        return
    last["content"] = "\n".join(text for text in (last["content"], message["content"]) if text)
    if calls := [*last.get("tool_calls", ()), *message.get("tool_calls", ())]:
        last["tool_calls"] = calls


def _pieces(role: str, content: object, at: str, calls: set[str]) -> list[Message]:
    """One message in chat's shape. Results of tools become messages of their own, before the text."""
    if not isinstance(content, list):
        return [{"role": role, "content": _text(content, at)}]
    texts: list[str] = []
    made: list[Message] = []
    results: list[Message] = []
    for index, block in enumerate(content):
        here = f"{at}[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_block_text(block, here))
        elif kind == "tool_use" and role == "assistant":
            made.append(_call(block, here))
            calls.add(made[-1]["id"])
        elif kind == "tool_result" and role == "user":
            results.append(_result(block, here, calls))
        elif kind not in _LEFT_OUT or role != "assistant":
            raise _unsupported_block(here)
    message: Message = {"role": role, "content": "\n".join(texts)}
    if made:
        message["tool_calls"] = made
    return [*results, message] if texts or made or not results else results


def _call(block: Mapping[str, Any], at: str) -> Message:
    for name in ("id", "name"):
        if not isinstance(block.get(name), str):
            raise bad_request(f"{at}.{name} must be a string", f"{at}.{name}", ErrorCode.INVALID_TYPE)
    if not isinstance(block.get("input"), dict):
        raise bad_request(f"{at}.input must be an object", f"{at}.input", ErrorCode.INVALID_TYPE)
    function = {"name": block["name"], "arguments": block["input"]}
    return {"id": block["id"], "type": "function", "function": function}


def _result(block: Mapping[str, Any], at: str, calls: set[str]) -> Message:
    """A tool's result as a message. Chat can't mark it as an error, so an error's text begins with `Error: `."""
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str) or call_id not in calls:
        text = f"{at}.tool_use_id must be the id of a tool_use block of an earlier message, and each has one result"
        raise bad_request(text, f"{at}.tool_use_id")
    calls.remove(call_id)
    content = block.get("content")
    text = "" if content is None else _text(content, f"{at}.content")
    return {"role": "tool", "tool_call_id": call_id, "content": f"Error: {text}" if block.get("is_error") else text}


def _text(content: object, at: str) -> str:
    """The text of a content: a string, or text blocks, which are joined with a new line between them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{at} must be a string or a list of blocks", at, ErrorCode.INVALID_TYPE)
    for index, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise _unsupported_block(f"{at}[{index}]")
    return "\n".join(_block_text(block, f"{at}[{index}]") for index, block in enumerate(content))


def _block_text(block: Mapping[str, Any], at: str) -> str:
    text = block.get("text")
    if not isinstance(text, str):
        raise bad_request(f"{at}.text must be a string", f"{at}.text", ErrorCode.INVALID_TYPE)
    return text


def _unsupported_block(at: str) -> ApiError:
    text = (
        f"{at}: only text, the assistant's tool_use and the user's tool_result are supported: no images, documents or "
        "server tools"
    )
    return bad_request(text, at, ErrorCode.UNSUPPORTED_PARAMETER)


def _tools(value: object) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad_request("tools must be a list", "tools", ErrorCode.INVALID_TYPE)
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(value)]


def _tool(tool: object, at: str) -> Message:
    if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
        text = f"{at}: only tools of the client are supported (type custom, with name and input_schema)"
        raise bad_request(text, at, ErrorCode.UNSUPPORTED_PARAMETER)
    if not isinstance(tool.get("input_schema"), dict):
        raise bad_request(f"{at}.input_schema must be a JSON schema: an object", f"{at}.input_schema")
    function = {name: tool[name] for name in ("name", "description", "strict") if name in tool}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(value: object) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in (*_CHOICES, "tool"):
        raise bad_request("tool_choice must be an object with a type: auto, any, tool or none", "tool_choice")
    alone = value.get("disable_parallel_tool_use")
    if not isinstance(alone, bool | None):
        at = "tool_choice.disable_parallel_tool_use"
        raise bad_request(f"{at} must be true or false", at, ErrorCode.INVALID_TYPE)
    choice: Any = _CHOICES.get(kind) or {"type": "function", "function": {"name": value.get("name")}}
    return {"tool_choice": choice, "parallel_tool_calls": not alone}
