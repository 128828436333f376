"""The body of POST /v1/responses: fields, types and limits.

`items` reads the input. Error messages name limits, never the client's values.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from guanaco.server.api.generation.conversation import refused_besides
from guanaco.server.api.generation.fields import HARMLESS, RouteFields
from guanaco.server.api.generation.protocol import (
    MAX_MESSAGES,
    MAX_TOP_K,
    MAX_TOP_LOGPROBS,
    SamplingExtensions,
    TokenCount,
    User,
)
from guanaco.server.api.values.adapters import AdapterChoices
from guanaco.server.api.values.base import Body
from guanaco.server.api.values.tokens import StopStrings
from guanaco.server.api.values.unsupported import Neutral

# OpenAI's limits for `metadata`: pairs, and characters of keys and values.
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_ID_CHARS = 64
LOGPROBS = "message.output_text.logprobs"
# The other names that OpenAI accepts here. They belong to images, reasoning and built-in tools, of which there are
# none.
_INCLUDABLE = frozenset(
    (
        *(LOGPROBS, "message.input_image.image_url", "reasoning.encrypted_content", "file_search_call.results"),
        *("web_search_call.results", "web_search_call.action.sources", "code_interpreter_call.outputs"),
        "computer_call_output.output.image_url",
    )
)


def _metadata(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_METADATA:
        raise PydanticCustomError("value_error", f"at most {MAX_METADATA} pairs")
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY_CHARS or not isinstance(text, str) or len(text) > MAX_METADATA_VALUE_CHARS:
            limits = f"keys of at most {MAX_METADATA_KEY_CHARS} and texts of at most {MAX_METADATA_VALUE_CHARS}"
            raise PydanticCustomError("value_error", f"give {limits} characters")
    return value


def _include(value: object) -> object:
    for name in value if isinstance(value, list) else ():
        if not isinstance(name, str) or name not in _INCLUDABLE:
            raise PydanticCustomError("value_error", "it has a name that isn't known here")
    return value


_ITEM = {"type": "object"}
# Read by `items`, which knows what each kind of item may be.
Input = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM, "maxItems": MAX_MESSAGES}]}),
]


_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["type", "name"],
}
# Read by `items`, and then checked as chat's.
ToolList = Annotated[Any, WithJsonSchema({"type": ["array", "null"], "items": _TOOL})]
ToolChoice = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]})
]
TextFormat = Annotated[
    dict[str, Any] | None,
    WithJsonSchema(
        {
            "type": ["object", "null"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "name": {"type": "string"},
                "schema": {"type": "object"},
                "strict": {"type": "boolean"},
            },
            "required": ["type"],
        }
    ),
]


class TextConfig(Body):
    """verbosity is accepted and ignored: the LLaMA family has no such setting."""

    format: TextFormat = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseBody(SamplingExtensions):
    """POST /v1/responses. The fields after `user` are extensions of this server, as in chat completions."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Input
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: Annotated[list[str] | None, BeforeValidator(_include)] = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_metadata)] = None
    parallel_tool_calls: bool | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)] | None = None
    store: bool | None = None
    stream: bool | None = None
    text: TextConfig | None = None
    tool_choice: ToolChoice = None
    tools: ToolList = None
    truncation: Literal["disabled"] | None = None
    user: User = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    stop: StopStrings = ()
    adapters: AdapterChoices = ()

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives of each token the answer shows; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


_OWN = frozenset(ResponseBody.model_fields)
# OpenAI's own fields that would change the answer.
_REFUSED: Mapping[str, Neutral] = {
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": ({},),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
}
_INSTEAD: Mapping[str, str] = {
    "background": "use stream",
    "conversation": "use previous_response_id",
    "max_completion_tokens": "use max_output_tokens",
    "max_tokens": "use max_output_tokens",
    "messages": "use input",
    "response_format": "use text.format",
    "system": "use instructions",
    "system_prompt": "use instructions",
}
_HARMLESS = frozenset(("max_tool_calls", "access_programs", *HARMLESS)) - {"background", "moderation"}
_IN_ITEM = frozenset(
    (
        *("id", "type", "role", "content", "status", "phase", "summary", "encrypted_content"),
        *("call_id", "name", "arguments", "output", "caller", "namespace"),
    )
)
_IN_PART = frozenset(("type", "text", "annotations", "logprobs", "prompt_cache_breakpoint"))
RESPONSE_FIELDS = RouteFields(
    own=_OWN,
    refused=refused_besides(_OWN, _REFUSED),
    aliases={},
    harmless=_HARMLESS - _OWN,
    instead=_INSTEAD,
    conversation="input",
    in_message=_IN_ITEM,
    in_part=_IN_PART,
)
