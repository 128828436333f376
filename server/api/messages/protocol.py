"""The bodies of Anthropic's Messages API: fields, types and limits.

`translate` reads the messages. Error messages name limits, never the client's values.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.conversation import refused_besides
from guanaco.server.api.generation.fields import HARMLESS, RouteFields
from guanaco.server.api.generation.protocol import MAX_MESSAGES, MAX_TOP_K, SamplingExtensions, TokenCount
from guanaco.server.api.values.adapters import AdapterChoices
from guanaco.server.api.values.base import Body
from guanaco.server.api.values.tokens import StopStrings
from guanaco.server.api.values.unsupported import Neutral

_TEXT = {"type": "string"}
_BLOCKS = {"type": "array", "items": {"type": "object", "required": ["type"]}}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": {"anyOf": [_TEXT, _BLOCKS]}},
    "required": ["role", "content"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "description": {"type": "string"},
        "input_schema": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["name", "input_schema"],
}
_TOOL_CHOICE = {
    "type": "object",
    "properties": {
        "type": {"enum": ["auto", "any", "tool", "none"]},
        "name": {"type": "string"},
        "disable_parallel_tool_use": {"type": "boolean"},
    },
    "required": ["type"],
}
# Read by `translate`, which knows what the blocks of each role may be.
Messages = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_MESSAGES),
    WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MAX_MESSAGES}),
]
System = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _BLOCKS, {"type": "null"}]})]


# Read by `translate`, and then checked as chat's.
ToolList = Annotated[Any, WithJsonSchema({"type": ["array", "null"], "items": _TOOL})]
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [_TOOL_CHOICE, {"type": "null"}]})]


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """effort is accepted and ignored: the LLaMA family has no such setting."""

    format: JsonFormat | None = None
    effort: Any = None


class Metadata(Body):
    user_id: str | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Messages
    system: System = None
    tools: ToolList = None
    tool_choice: ToolChoice = None
    output_config: OutputConfig | None = None
    adapters: AdapterChoices = ()


class MessagesBody(SamplingExtensions, CountBody):
    """POST /v1/messages. Anthropic's fields, `adapters`, and the extensions that all routes have."""

    max_tokens: TokenCount
    metadata: Metadata | None = None
    stop_sequences: StopStrings = ()
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    stream: bool | None = None


_OWN = frozenset(MessagesBody.model_fields)
# Anthropic's own fields that would change the answer.
_REFUSED: Mapping[str, Neutral] = {
    "compaction": (),
    "container": (),
    "context_management": ({}, {"edits": []}),
    "fallbacks": ([],),
    "mcp_servers": ([],),
    "output_format": (),
    "prefill": (),
    "prompt": (),
    "thinking": ({"type": "disabled"},),
    "thread": (),
}
# Anthropic's client may send only the new turns of a thread. At this code it sends the whole conversation instead.
_CODES = {"thread": ErrorCode.THREAD_UNSUPPORTED_REQUEST}
_INSTEAD: Mapping[str, str] = {
    "output_format": "use output_config.format",
    "response_format": "use output_config.format",
    "parallel_tool_calls": "use tool_choice.disable_parallel_tool_use",
    "thread": "send the whole conversation in messages",
    "thinking": "leave it out, or send {type: disabled}",
    "stop": "use stop_sequences",
    "max_completion_tokens": "use max_tokens",
    "max_output_tokens": "use max_tokens",
    "instructions": "use system",
    "system_prompt": "use system",
    "input": "use messages",
    "inputs": "use messages",
}
_HARMLESS = frozenset(
    (
        *("billing_policy", "cache_control", "diagnostics", "fallback_credit_token", "inference_geo", "speed"),
        *("user_profile_id", "workspace_id"),
        *HARMLESS,
    )
)
_IN_MESSAGE = frozenset(("role", "content", "id", "type"))
_IN_BLOCK = frozenset(
    (
        *("type", "text", "cache_control", "citations", "signature", "thinking", "data"),
        *("id", "name", "input", "caller", "tool_use_id", "content", "is_error", "toolset_name"),
    )
)
MESSAGES_FIELDS = RouteFields(
    own=_OWN,
    refused=refused_besides(_OWN, _REFUSED),
    aliases={},
    harmless=_HARMLESS - _OWN,
    instead=_INSTEAD,
    codes=_CODES,
    in_message=_IN_MESSAGE,
    in_part=_IN_BLOCK,
)
# Clients may also send a whole request to count its tokens, so the fields are the same.
COUNT_FIELDS = MESSAGES_FIELDS
