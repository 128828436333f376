"""The bodies that clients send: fields, types and limits of the OpenAI routes and of vLLM's extensions to them.

Error messages name limits, never the client's values.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from guanaco.server.api.generation.fields import (
    ALIASES,
    ALIASES_IN_COMPLETIONS,
    ALIASES_OF_TOKENIZE,
    HARMLESS_OUTSIDE_CHAT,
    INSTEAD_IN_MESSAGE,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_IN_MESSAGE,
    RouteFields,
    asks_for_nothing,
)
from guanaco.server.api.tools.fields import ToolCallId, ToolCalls, ToolChoiceField, Tools
from guanaco.server.api.values.adapters import AdapterChoices, AdapterName, NumberedAdapters
from guanaco.server.api.values.base import Body, fail, schema
from guanaco.server.api.values.template_variables import TemplateVariables
from guanaco.server.api.values.tokens import (
    IDS_SCHEMA,
    AllowedTokenIds,
    BadWords,
    LogitBias,
    StopStrings,
    StopTokenIds,
    token_ids,
)
from guanaco.server.api.values.unsupported import REFUSED

# Limits of one request. A request above one is refused before any work is done for it.
MAX_MESSAGES = 512
MAX_CHOICES = 8  # n
MAX_PROMPTS = 128  # lm-eval sends 64. Prompts times n are also limited by --max-queued-requests
MAX_TOP_K = 1000
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 20  # OpenAI: 5
MAX_PROMPT_LOGPROBS = 2**20  # in all prompts of a request together: each position's own and its alternatives'
DEFAULT_COMPLETION_TOKENS = 16  # max_tokens of a text completion, as OpenAI documents; chat uses all the room left
MAX_TOTAL_TOKENS = 8192  # limit of n × max_tokens if n > 1; the context's length if that is longer
MAX_SALT_CHARS = 256
MAX_TOKENS = 1 << 20  # the most tokens that /tokenize returns and /detokenize accepts


def _content(value: object) -> str:
    """A message's text: a string, or text parts, which are joined with a new line between them."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise fail("give a string, or a list of parts of type text")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise fail("only content parts of type text are supported: no images, audio or files")
        if not isinstance(part.get("text"), str):
            raise fail("a part of type text must have a string as its text")
        texts.append(part["text"])
    return "\n".join(texts)


Prompt = str | tuple[int, ...]


def _prompts(value: object) -> tuple[Prompt, ...]:
    """One or more prompts, each a string or token ids: str | [str] | [int] | [[int]]."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise fail("give a string, token ids, or a list of strings or of lists of token ids; not an empty list")
    if all(type(item) is int for item in value):
        return (token_ids(value, len(value)),)
    if len(value) > MAX_PROMPTS:
        raise fail(f"at most {MAX_PROMPTS} prompts")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if not all(isinstance(item, list) for item in value):
        raise fail("give prompts of one kind: all strings, or all lists of token ids")
    return tuple(token_ids(item, len(item)) for item in value)


def _tokens_kept(value: int) -> int:
    if value == 0:
        raise fail("give 1 or more, or -1 for what the context has room for")
    return value


def _n(value: object) -> object:
    return 1 if value is None else value


_PARTS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}

Content = Annotated[str, BeforeValidator(_content), schema(anyOf=[{"type": "string"}, _PARTS_SCHEMA])]
Prompts = Annotated[
    tuple[Prompt, ...],
    BeforeValidator(_prompts),
    schema(
        anyOf=[
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}, "maxItems": MAX_PROMPTS},
            IDS_SCHEMA,
            {"type": "array", "items": IDS_SCHEMA, "maxItems": MAX_PROMPTS},
        ]
    ),
]
# The required form of the answer. `server.grammars.requested` reads it.
_ResponseFormat = Annotated[
    Any,
    schema(
        type=["object", "null"],
        properties={"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"}},
        required=["type"],
    ),
]
_Json = Annotated[Any, schema(type=["object", "string", "boolean", "null"])]
_Text = Annotated[Any, schema(type=["string", "null"])]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
TokensKept = Annotated[int, AfterValidator(_tokens_kept), Field(ge=-1, lt=2**31)] | None
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# The end user, by whom a weighted alias may choose its target. A value of another type is ignored, not refused,
# as it was before the field had a meaning.
User = Annotated[str | None, BeforeValidator(lambda value: value if isinstance(value, str) else None)]


class SamplingExtensions(Body):
    """The sampling fields that all generating routes have under the same names: some of OpenAI's chat, and vLLM's."""

    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    speculation: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: LogitBias = ()
    allowed_token_ids: AllowedTokenIds = None
    bad_words: BadWords = ()
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None


class GenerationBody(SamplingExtensions):
    """The fields that chat and text completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None  # 0 and -1: all
    n: Annotated[int, BeforeValidator(_n), Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    stop: StopStrings = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    adapters: AdapterChoices = ()
    adapter_id: AdapterName = None
    lora_path: AdapterName = None
    lora: NumberedAdapters = None
    truncate_prompt_tokens: TokensKept = None
    user: User = None
    response_format: _ResponseFormat = None
    structured_outputs: Annotated[Any, schema(type=["object", "null"])] = None
    guided_json: _Json = None
    guided_regex: _Text = None
    guided_choice: Annotated[Any, schema(type=["array", "null"], items={"type": "string"})] = None
    guided_grammar: _Text = None

    @property
    def num_drawn(self) -> int:
        """How many choices are generated for each prompt: n, or `best_of`, of which the best n are in the answer."""
        return max(self.n, self.best_of or 0)

    @property
    def token_limit(self) -> int | None:
        """The client's limit of a choice's tokens; None: it set none."""
        return self.max_tokens


class ChatMessage(Body):
    """One message. The role `function` and the field function_call, OpenAI's old form of tools, are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    tool_calls: ToolCalls = ()
    tool_call_id: ToolCallId = None
    name: User = None

    @property
    def num_bytes(self) -> int:
        """The bytes of its text and calls."""
        return len(self.content.encode()) + sum(call.num_bytes for call in self.tool_calls)

    def template_message(self) -> dict[str, Any]:
        """The message in the form for chat templates. The role `developer` becomes `system`, its older name."""
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
        raise fail("each message must be an object with role and content")
    for name, neutral in REFUSED_IN_MESSAGE.items():
        if not asks_for_nothing(value.get(name), neutral):
            advice = f": {INSTEAD_IN_MESSAGE[name]}" if name in INSTEAD_IN_MESSAGE else ""
            raise fail(f"{name} is not supported in a message{advice}")
    if value.get("role") == "function":
        raise fail("the role function is not supported: use the role tool, with tool_call_id")
    if value.get("role") != "assistant" and value.get("tool_calls"):
        raise fail("only a message of the role assistant has tool_calls")
    if value.get("content") is None and value.get("role") != "assistant":
        raise fail("a message must have content")
    return {"content": None, **value}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Annotated[ChatMessage, BeforeValidator(_message)]], Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None  # true, or false with continue_final_message
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables = None
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
    """POST /tokenize: a text as it is, or messages through the model's chat template. Without `model`: the base."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    adapters: AdapterChoices = ()
    adapter_id: AdapterName = None
    lora_path: AdapterName = None
    lora: NumberedAdapters = None
    user: User = None
    prompt: str | None = None
    messages: (
        Annotated[list[Annotated[ChatMessage, BeforeValidator(_message)]], Field(min_length=1, max_length=MAX_MESSAGES)]
        | None
    ) = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables = None
    tools: Tools = ()
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    return_token_strs: bool | None = None
    truncate_prompt_tokens: TokensKept = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # of the answer, as the generating routes have it
    max_completion_tokens: TokenCount | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tokens: Annotated[
        tuple[int, ...], BeforeValidator(lambda value: token_ids(value, MAX_TOKENS)), schema(**IDS_SCHEMA)
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
