"""The bodies that clients send: fields, types and limits of the OpenAI routes and of vLLM's extensions to them.

Says what a request may hold, not what is done with it. Nothing here is echoed: messages name limits, never values.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from guanaco.server.api.generation.fields import (
    ALIASES,
    ALIASES_IN_COMPLETIONS,
    ALIASES_OF_TOKENIZE,
    HARMLESS_OUTSIDE_CHAT,
    INSTEAD_IN_MESSAGE,
    REFUSED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGE,
    RouteFields,
    asks_for_nothing,
)
from guanaco.server.api.tools.fields import ToolCallId, ToolCalls, ToolChoiceField, Tools

# Limits (shared/design/reliability.md 2.6): what one request may ask for, refused before any work is done for it.
MAX_MESSAGES = 512
MAX_CHOICES = 8  # n
MAX_PROMPTS = 128  # lm-eval sends 64; with n they are bounded by what may wait (--max-queued-requests), too
MAX_STOP_STRINGS = 16  # OpenAI: 4; lm-eval's own tasks send six
MAX_STOP_CHARS = 128
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_K = 1000
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 20  # OpenAI: 5
MAX_PROMPT_LOGPROBS = 2**20  # of all prompts of a request, each position's own and its likeliest ones
DEFAULT_COMPLETION_TOKENS = 16  # max_tokens of a text completion, as OpenAI documents it; in chat: the room left
MAX_LOGIT_BIAS = 300
MAX_TOTAL_TOKENS = 8192  # n × max_tokens where n > 1, or the context where that is longer
MAX_SALT_CHARS = 256
MAX_TOKENS = 1 << 20  # that /tokenize gives and /detokenize takes
MAX_ADAPTER_SCALE = 16.0  # of one adapter in a mixture, either sign


def _fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", message)


def _stop_strings(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _fail("give a string, or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise _fail(f"at most {MAX_STOP_STRINGS} stop strings")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _fail(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _token_ids(value: object, most: int) -> tuple[int, ...]:
    ids = [] if value is None else value
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise _fail("give a list of token ids: integers, 0 or more")
    if len(ids) > most:
        raise _fail(f"at most {most} token ids")
    return tuple(ids)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise _fail("give an object of token ids and numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise _fail(f"at most {MAX_LOGIT_BIAS} token ids")
    if not all(isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) for key in value):
        raise _fail("the keys must be token ids, in decimal digits")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise _fail("the values must be numbers from -100 to 100")
    biases = {int(key): float(bias) for key, bias in value.items()}
    if len(biases) != len(value):
        raise _fail("a token id appears twice")
    return tuple(biases.items())


def _content(value: object) -> str:
    """A message's text: a string, or text parts, which become one text with a line for each."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise _fail("give a string, or a list of parts of type text")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise _fail("only content parts of type text are supported: no images, audio or files")
        if not isinstance(part.get("text"), str):
            raise _fail("a part of type text must have a string as its text")
        texts.append(part["text"])
    return "\n".join(texts)


Prompt = str | tuple[int, ...]


def _prompts(value: object) -> tuple[Prompt, ...]:
    """One or more prompts, each a string or token ids: str | [str] | [int] | [[int]]."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _fail("give a string, token ids, or a list of strings or of lists of token ids; not an empty list")
    if all(type(item) is int for item in value):
        return (_token_ids(value, len(value)),)
    if len(value) > MAX_PROMPTS:
        raise _fail(f"at most {MAX_PROMPTS} prompts")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if not all(isinstance(item, list) for item in value):
        raise _fail("give prompts of one kind: all strings, or all lists of token ids")
    return tuple(_token_ids(item, len(item)) for item in value)


def _n(value: object) -> object:
    return 1 if value is None else value


def _schema(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema(schema)


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PARTS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}

StopStrings = Annotated[
    tuple[str, ...],
    BeforeValidator(_stop_strings),
    _schema(anyOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]),
]
StopTokenIds = Annotated[
    tuple[int, ...], BeforeValidator(lambda value: _token_ids(value, MAX_STOP_TOKEN_IDS)), _schema(**_IDS_SCHEMA)
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_logit_bias),
    _schema(type=["object", "null"], additionalProperties={"type": "number", "minimum": -100, "maximum": 100}),
]
Content = Annotated[str, BeforeValidator(_content), _schema(anyOf=[{"type": "string"}, _PARTS_SCHEMA])]
Prompts = Annotated[
    tuple[Prompt, ...],
    BeforeValidator(_prompts),
    _schema(
        anyOf=[
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": MAX_PROMPTS},
            _IDS_SCHEMA,
            {"type": "array", "items": _IDS_SCHEMA, "maxItems": MAX_PROMPTS},
        ]
    ),
]
# What the answer must look like: `server.grammars.requested` reads these.
_ResponseFormat = Annotated[
    Any,
    _schema(
        type=["object", "null"],
        properties={"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"}},
        required=["type"],
    ),
]
_Json = Annotated[Any, _schema(type=["object", "string", "boolean", "null"])]
_Text = Annotated[Any, _schema(type=["string", "null"])]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """What all bodies share: strict types and finite numbers. `fields` says what happens to fields that aren't here."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AdapterChoice(Body):
    """One adapter of a mixture: delta = scale · its own. Negative scales take away, zero switches off.

    A field besides the two (`weight`, `path`) is refused: it could only change the mixture."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)] = 1.0


def _adapter_choices(value: object) -> object:
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise _fail("give a list of objects with name and scale; leave the field out for none")
    return tuple(value)


AdapterChoices = Annotated[
    tuple[AdapterChoice, ...],
    BeforeValidator(_adapter_choices),
    WithJsonSchema({"type": "array", "items": AdapterChoice.model_json_schema()}),
]
# Nobody is refused for it, as nobody was before it meant something: weighted aliases choose by it.
User = Annotated[str | None, BeforeValidator(lambda value: value if isinstance(value, str) else None)]


class GenerationBody(Body):
    """The fields that chat and text completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, BeforeValidator(_n), Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: int | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings = ()
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: LogitBias = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapters: AdapterChoices = ()
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    user: User = None
    response_format: _ResponseFormat = None
    structured_outputs: Annotated[Any, _schema(type=["object", "null"])] = None
    guided_json: _Json = None
    guided_regex: _Text = None
    guided_choice: Annotated[Any, _schema(type=["array", "null"], items={"type": "string"})] = None
    guided_grammar: _Text = None

    @property
    def token_limit(self) -> int | None:
        """What the client says of a choice's tokens."""
        return self.max_tokens


class ChatMessage(Body):
    """One message. The role function, and with it function_call, is OpenAI's old form of tools: not taken."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    tool_calls: ToolCalls = ()
    tool_call_id: ToolCallId = None
    name: User = None

    @property
    def num_bytes(self) -> int:
        """Of its text."""
        return len(self.content.encode()) + sum(call.num_bytes for call in self.tool_calls)

    def template_message(self) -> dict[str, Any]:
        """The message as chat templates know it: `developer` is OpenAI's newer name of `system`."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.tool_calls:
            message["tool_calls"] = [call.shown() for call in self.tool_calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return message


def _message(value: object) -> object:
    if not isinstance(value, dict):
        raise _fail("each message must be an object with role and content")
    for name, neutral in REFUSED_IN_MESSAGE.items():
        if not asks_for_nothing(value.get(name), neutral):
            advice = f": {INSTEAD_IN_MESSAGE[name]}" if name in INSTEAD_IN_MESSAGE else ""
            raise _fail(f"{name} is not supported in a message{advice}")
    if value.get("role") == "function":
        raise _fail("the role function is not supported: use the role tool, with tool_call_id")
    if value.get("role") != "assistant" and value.get("tool_calls"):
        raise _fail("only a message of the role assistant has tool_calls")
    if value.get("content") is None and value.get("role") != "assistant":
        raise _fail("a message must have content")
    return {"content": None, **value}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Annotated[ChatMessage, BeforeValidator(_message)]], Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    tools: Tools = ()
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0: with echo, the prompt is scored
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeBody(Body):
    """POST /tokenize: a text as it is, or messages through the model's chat template (none given: the base's)."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    adapters: AdapterChoices = ()
    user: User = None
    prompt: str | None = None
    messages: (
        Annotated[list[Annotated[ChatMessage, BeforeValidator(_message)]], Field(min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    tools: Tools = ()
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tokens: Annotated[
        tuple[int, ...], BeforeValidator(lambda value: _token_ids(value, MAX_TOKENS)), _schema(**_IDS_SCHEMA)
    ]
    skip_special_tokens: bool | None = None  # SGLang's; false where it isn't given, as in vLLM


_CHAT, _COMPLETION = frozenset(ChatBody.model_fields), frozenset(CompletionBody.model_fields)
CHAT_FIELDS = RouteFields(_CHAT, REFUSED_IN_CHAT, ALIASES)
COMPLETION_FIELDS = RouteFields(_COMPLETION, REFUSED_IN_COMPLETIONS, ALIASES_IN_COMPLETIONS, HARMLESS_OUTSIDE_CHAT)
# Routers send a whole chat request to /tokenize: it takes and refuses the same fields.
_TOKENIZE = frozenset(TokenizeBody.model_fields)
TOKENIZE_CHAT_FIELDS = RouteFields(
    _CHAT | _TOKENIZE,
    {**REFUSED_IN_CHAT, "add_special": (False,)},
    {**ALIASES, "with_pieces": "return_token_strs"},
)
TOKENIZE_PROMPT_FIELDS = RouteFields(
    _COMPLETION | _TOKENIZE,
    REFUSED_IN_COMPLETIONS,
    {**ALIASES_IN_COMPLETIONS, **ALIASES_OF_TOKENIZE},
    HARMLESS_OUTSIDE_CHAT,
)
DETOKENIZE_FIELDS = RouteFields(frozenset(DetokenizeBody.model_fields), REFUSED, {}, HARMLESS_OUTSIDE_CHAT)
