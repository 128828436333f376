"""A conversation in the shape of OpenAI's chat → a prompt that is ready for the engine.

The chat route takes such a body. Other routes translate their bodies into one first, so that a conversation means the
same everywhere. Knows neither HTTP nor answers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import TemplateError
from guanaco.models.text.chat_template import ChatTemplate
from guanaco.server.api.generation.body import renamed_errors, validate
from guanaco.server.api.generation.catalog import Caller
from guanaco.server.api.generation.fields import ALIASES, REFUSED_IN_CHAT
from guanaco.server.api.generation.ignored import Ignored
from guanaco.server.api.generation.protocol import MAX_TOKENS, ChatBody, ChatMessage, TokenizeBody
from guanaco.server.api.generation.sampling import check_request, check_scored_size, num_tokens_kept, sampling_params
from guanaco.server.api.generation.serving import (
    MAX_BYTES_PER_TOKEN,
    Prepared,
    Prompt,
    acquire_model,
    check_text_size,
    check_token_ids,
    grammar_of,
)
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.api.tools.plan import ToolPlan, plan_tools
from guanaco.server.api.values.unsupported import Neutral

# Values of chat's fields that change nothing, besides their defaults.
_NEUTRAL: Mapping[str, Neutral] = {
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "speculation": (True,),
    "stop": ([],),
    "stop_token_ids": ([],),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
# Fields of chat that other routes ignore instead of refusing them.
_HARMLESS_ELSEWHERE = frozenset(("user", "stream_options"))


def refused_besides(own: Collection[str], specific: Mapping[str, Neutral]) -> Mapping[str, Neutral]:
    """The fields that a route with fields of its own must refuse: `specific`, and chat's fields that it doesn't have.
    Otherwise a client that sends a chat field would get an answer that ignores it."""
    chat = {name: _NEUTRAL.get(name, ()) for name in (*ChatBody.model_fields, *ALIASES, *REFUSED_IN_CHAT)}
    known = {**chat, **REFUSED_IN_CHAT, **specific}
    return {name: known[name] for name in known if name not in own and name not in _HARMLESS_ELSEWHERE}


def chat_body(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatBody:
    """Validate a body that was translated to chat's fields. names: chat's name → the client's, for errors."""
    with renamed_errors(names):
        return validate(ChatBody, dict(fields))


def prepare_conversation(
    state: ApiState,
    caller: Caller,
    body: ChatBody,
    admission: Admission,
    ignored: Ignored,
    *,
    fit_into_context: bool = False,
) -> Prepared:
    """Tokenise the conversation and make its sampling parameters. Runs on a worker thread. Raises a 400, 404 or 503.

    fit_into_context: a token limit above the room in the context is lowered to it instead of refused.
    """
    check_request(body, state.num_token_ids)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    grammar = grammar_of(body)
    model = acquire_model(state, body, caller, admission)
    template = state.template_for(model)
    tools = tool_plan(state, template, body)
    is_guided = grammar is None and tools.guides_text
    # An answer by a grammar of its own has no calls, even if its text looks like one.
    has_own = grammar is not None and grammar.param != "response_format" and not tools.is_forced
    tools = replace(tools, is_sure=is_guided, setting="none" if has_own else tools.setting)
    grammar = tools.grammar(grammar)
    token_ids = render_messages(
        state,
        template,
        body.messages,
        model.max_model_len,
        tools=tools,
        ending=PromptEnding.of(body),
        keep=num_tokens_kept(body, model.max_model_len),
    )
    params = sampling_params(
        body,
        state.defaults_for(model),
        tokenizer=state.tokenizer,
        limit=None if fit_into_context else body.token_limit,
        default_limit=body.token_limit if fit_into_context else None,
        limit_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        num_prompt_tokens=len(token_ids),
        max_model_len=model.max_model_len,
        prompt_name="messages",
        num_logprobs=body.num_logprobs,
        prompt_logprobs=body.prompt_logprobs,
        more_stops=() if body.ignore_eos else state.stops_of(model, in_text=grammar is None or is_guided),
    )
    if params.skip_special_tokens and (visible := tools.visible_ids):
        hidden = state.tokenizer.special_ids - visible
        params = replace(params, skip_special_tokens=False, hidden_token_ids=hidden)
    check_scored_size(body, len(token_ids))
    salt = state.keys.cache_salt(caller.key, body.cache_salt)
    return Prepared(body, model, (Prompt(token_ids, params),), salt, ignored, grammar, tools)


@dataclass(frozen=True)
class PromptEnding:
    """How a conversation's prompt ends, and the client's own variables for the template."""

    add_generation_prompt: bool = True  # the prompt ends with the beginning of an answer
    continue_final_message: bool = False  # the prompt ends within the last message, which the model continues
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, body: ChatBody | TokenizeBody) -> "PromptEnding":
        """The ending that a body asks for. Raises a 400 if its fields contradict each other."""
        continues = body.continue_final_message is True
        if continues and body.add_generation_prompt:
            text = "continue_final_message and add_generation_prompt can't both be true: one begins a new answer"
            raise bad_request(text, "continue_final_message")
        adds = not continues and body.add_generation_prompt is not False
        return cls(adds, continues, body.chat_template_kwargs or {})

    def check(self, messages: Sequence[ChatMessage], tools: ToolPlan) -> None:
        """Raise a 400 if there is no message to continue."""
        if not self.continue_final_message:
            return
        if messages[-1].role != "assistant":
            text = "continue_final_message needs a last message of the role assistant: its text is continued"
            raise bad_request(text, "continue_final_message")
        if messages[-1].tool_calls:
            text = "continue_final_message continues text: the last message must not have tool_calls"
            raise bad_request(text, "continue_final_message")
        if tools.is_forced:
            text = "continue_final_message continues text, and tool_choice asks for a call: give one of them"
            raise bad_request(text, "continue_final_message")


def tool_plan(state: ApiState, template: ChatTemplate | None, body: ChatBody | TokenizeBody) -> ToolPlan:
    """The plan for a conversation's tools. Raises a 400 if the fields contradict each other.

    template: the model's; None: it has none. In place of the tokenizer's own template, its separate one for
    chats with tools is used, if there is one.
    """
    plan = plan_tools(
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        template=template,
        tokenizer=state.tokenizer,
        setting=state.settings.tool_format,
    )
    own = state.tokenizer.tool_template
    return replace(plan, template=own) if plan.shown and own and template is state.tokenizer.chat_template else plan


def render_messages(
    state: ApiState,
    template: ChatTemplate | None,
    messages: list[ChatMessage],
    max_model_len: int,
    *,
    tools: ToolPlan,
    ending: "PromptEnding | None" = None,
    max_tokens: int | None = None,
    keep: int | None = None,
) -> tuple[int, ...]:
    """The conversation's token ids, made with the chat template. Raises a 400 if the template refuses it.

    max_tokens: more raise a 400. None: the context's length; a longer conversation is refused later, so it need not be
    encoded to its end. keep: keep only this many of the last tokens; None: all.
    """
    check_text_size(sum(message.num_bytes for message in messages), max_model_len, "messages")
    check_text_size(tools.num_bytes, max_model_len, "tools")
    ending = ending or PromptEnding()
    if keep is not None and max_tokens is None:
        max_tokens = MAX_TOKENS  # the last tokens are kept, so all must be encoded
    ending.check(messages, tools)
    if template is None:
        text = "this model has no chat template: use /v1/completions, or start the server with --chat-template NAME"
        raise bad_request(text, "messages", ErrorCode.NO_CHAT_TEMPLATE)
    try:
        shown, functions = tools.prompt([message.template_message() for message in messages])
        token_ids = state.tokenizer.encode_chat(
            shown,
            tools=functions,
            add_generation_prompt=ending.add_generation_prompt,
            continue_final_message=ending.continue_final_message,
            variables=ending.variables,
            template=tools.template,
            max_chars=max_model_len * MAX_BYTES_PER_TOKEN,
            max_tokens=max_model_len if max_tokens is None else max_tokens,
        )
    except TemplateError as error:  # its message may quote the client's text, so only its code is used
        raise _template_problem(error.code) from None
    if not token_ids:
        raise bad_request("the messages come to no tokens at all", "messages")
    if ending.add_generation_prompt and (begun := tools.begun) is not None:
        token_ids.append(begun)
    if max_tokens is not None and len(token_ids) > max_tokens:
        raise bad_request(f"the messages come to more than {max_tokens} tokens: send less at once", "messages")
    check_token_ids(state, token_ids, "messages")
    return tuple(token_ids if keep is None else token_ids[-keep:])


def _template_problem(code: ErrorCode) -> ApiError:
    """The client's error for a chat template that gave no prompt. code: the template error's."""
    instead = "ask the server's operator for another chat template, or use /v1/completions"
    match code:
        case ErrorCode.TEMPLATE_TIMEOUT:
            text = f"the model's chat template took too long with these messages and was stopped: {instead}"
        case ErrorCode.TEMPLATE_TOO_LARGE:
            text = f"the model's chat template made more of these messages than the context holds: {instead}"
        case ErrorCode.TEMPLATE_CRASHED:
            text = f"the model's chat template broke the process that renders it: {instead}"
        case ErrorCode.TEMPLATE_BUSY:
            text = "the model's chat template is slow, and another chat is being prepared with it; try again later"
            return ApiError(503, code, text, param="messages", retry_after=1)
        case ErrorCode.TEMPLATE_UNAVAILABLE:
            text = "the process that prepares chats ended or could not be started; try again, the log has the reason"
            return ApiError(503, code, text, retry_after=5)
        case _:
            code, text = (
                ErrorCode.TEMPLATE_ERROR,
                "the model's chat template doesn't take these messages (their roles or their order)",
            )
    return bad_request(text, "messages", code)
