"""POST /v1/chat/completions: messages in, one or more answers out, streamed or whole."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.body import body_schema, take_fields
from guanaco.server.api.generation.catalog import Caller, ServedModel
from guanaco.server.api.generation.logprobs import chat_logprobs
from guanaco.server.api.generation.protocol import CHAT_FIELDS, ChatBody, ChatMessage
from guanaco.server.api.generation.sampling import check_request, sampling_params
from guanaco.server.api.generation.serving import (
    MAX_BYTES_PER_TOKEN,
    Prepared,
    Prompt,
    acquire_model,
    check_text_size,
    check_token_ids,
    serve,
)
from guanaco.server.api.generation.state import ApiState, ChatTokenizer, Template
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.engine.request import FinishReason, TokenLogprob
from guanaco.server.engine.request_stream import TextOutput

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", summary="Answer a conversation", openapi_extra=body_schema(ChatBody))
async def chat_completions(request: Request) -> Response:
    return await serve(request, prepare_chat)


def prepare_chat(
    state: ApiState, caller: Caller, data: dict[str, Any], admission: Admission
) -> tuple[Prepared, "ChatAnswer"]:
    """Validate and tokenise. Runs on a worker thread."""
    fields = take_fields(data, CHAT_FIELDS)
    body = fields.validate(ChatBody)
    check_request(body, state.num_token_ids)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    model = acquire_model(state, body, caller, admission)
    template = state.template_for(model)
    token_ids = render_messages(
        state,
        template,
        body.messages,
        model.max_model_len,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    params = sampling_params(
        body,
        state.defaults_for(model),
        tokenizer=state.tokenizer,
        limit=body.token_limit,
        limit_name="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        num_prompt_tokens=len(token_ids),
        max_model_len=model.max_model_len,
        prompt_name="messages",
        num_logprobs=body.num_logprobs,
        more_stops=() if body.ignore_eos else state.stops_of(model),
    )
    salt = state.keys.cache_salt(caller.key, body.cache_salt)
    prepared = Prepared(body, model, (Prompt(token_ids, params),), salt, fields.ignored)
    return prepared, ChatAnswer(body, model, state.tokenizer)


def render_messages(
    state: ApiState,
    template: Template | None,
    messages: list[ChatMessage],
    max_model_len: int,
    *,
    add_generation_prompt: bool,
) -> tuple[int, ...]:
    """The conversation as token ids, through the chat template. 400 where it doesn't suit the template."""
    check_text_size(sum(len(message.content.encode()) for message in messages), max_model_len, "messages")
    if template is None:
        text = "this model has no chat template: use /v1/completions, or start the server with --chat-template NAME"
        raise bad_request(text, "messages", "no_chat_template")
    try:
        token_ids = state.tokenizer.encode_chat(
            [message.template_message() for message in messages],
            add_generation_prompt=add_generation_prompt,
            template=template,
            max_chars=max_model_len * MAX_BYTES_PER_TOKEN,
        )
    except state.template_errors as error:
        raise _template_problem(getattr(error, "code", "template_error")) from None
    if not token_ids:
        raise bad_request("the messages come to no tokens at all", "messages")
    check_token_ids(state, token_ids, "messages")
    return tuple(token_ids)


def _template_problem(code: str) -> ApiError:
    """What a client is told of a chat template that gave no prompt. `code` is the template error's own."""
    instead = "ask the server's operator for another chat template, or use /v1/completions"
    match code:
        case "template_timeout":
            text = f"the model's chat template took too long with these messages and was stopped: {instead}"
        case "template_too_large":
            text = f"the model's chat template made more of these messages than the context holds: {instead}"
        case "template_crashed":
            text = f"the model's chat template broke the process that renders it: {instead}"
        case "template_busy":
            text = "the model's chat template is slow, and another chat is being prepared with it; try again later"
            return ApiError(503, code, text, param="messages", retry_after=1)
        case "template_unavailable":
            text = "the process that prepares chats ended or could not be started; try again, the log has the reason"
            return ApiError(503, code, text, retry_after=5)
        case _:
            code, text = (
                "template_error",
                "the model's chat template doesn't take these messages (their roles or their order)",
            )
    return bad_request(text, "messages", code)


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    started: bool = False


class ChatAnswer(Answer):
    """A chat completion, chunk by chunk or whole."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, body: ChatBody, model: ServedModel, tokenizer: ChatTokenizer) -> None:
        super().__init__(body, model)
        self._tokenizer = tokenizer
        self._with_logprobs = bool(body.logprobs)
        self._choices = [_Choice() for _ in range(body.n)]

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def has_logprobs(self) -> bool:
        return self._with_logprobs

    def choice_chunk(self, index: int, output: TextOutput) -> dict[str, Any] | None:
        choice = self._choices[index]
        choice.logprobs += output.logprobs
        if not output.text and output.finish_reason is None:
            return None
        delta: dict[str, Any] = {}
        if not choice.started:
            delta = {"role": "assistant", "content": output.text}
        elif output.text:
            delta = {"content": output.text}
        choice.started = True
        logprobs, choice.logprobs = choice.logprobs, []
        return {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(self._tokenizer, logprobs) if self.has_logprobs else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def add(self, index: int, output: TextOutput) -> None:
        choice = self._choices[index]
        choice.texts.append(output.text)
        choice.logprobs += output.logprobs
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason

    def choice(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if self.has_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
