"""POST /v1/chat/completions: messages in, one or more answers out, streamed or whole."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.answer import ChoicesAnswer
from guanaco.server.api.generation.body import body_schema, take_fields
from guanaco.server.api.generation.catalog import Caller, ServedModel
from guanaco.server.api.generation.conversation import prepare_conversation
from guanaco.server.api.generation.logprobs import chat_logprobs
from guanaco.server.api.generation.protocol import CHAT_FIELDS, ChatBody
from guanaco.server.api.generation.serving import Prepared, serve
from guanaco.server.api.generation.state import ApiState, ChatTokenizer
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
    prepared = prepare_conversation(state, caller, body, admission, fields.ignored)
    return prepared, ChatAnswer(body, prepared.model, state.tokenizer)


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    started: bool = False


class ChatAnswer(ChoicesAnswer):
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
