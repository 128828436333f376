"""POST /v1/chat/completions: messages in, one or more answers out, streamed or whole."""

from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.generation.answer import ChoicesAnswer
from guanaco.server.api.generation.body import body_schema, take_fields
from guanaco.server.api.generation.catalog import Caller, ServedModel
from guanaco.server.api.generation.conversation import prepare_conversation
from guanaco.server.api.generation.logprobs import chat_logprobs, prompt_logprobs
from guanaco.server.api.generation.protocol import CHAT_FIELDS, ChatBody
from guanaco.server.api.generation.serving import Prepared, serve
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.api.tools.calls import TOOL_CALLS, ChoiceCalls, deltas
from guanaco.server.api.tools.plan import ToolPlan
from guanaco.server.api.tools.reader import Event, ToolCallReader, read_events
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
    return prepared, ChatAnswer(body, prepared.model, state.tokenizer, prepared.tools)


@dataclass
class _Choice:
    reader: ToolCallReader | None  # None: all of its text is content
    calls: ChoiceCalls = field(default_factory=ChoiceCalls)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    is_shown: bool = False  # a chunk of it was sent
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    started: bool = False  # its first delta, which has the role, was made

    def read(self, output: TextOutput) -> list[Event]:
        """The content and calls in an output."""
        return read_events(self.reader, output.text, is_last=output.finish_reason is not None)

    def finish_reason_of(self, output: TextOutput) -> str | None:
        """The finish reason for clients. An answer with calls that ended by itself has "tool_calls"."""
        has_calls = self.reader is not None and self.reader.num_calls > 0
        return TOOL_CALLS if has_calls and output.finish_reason is FinishReason.STOP else output.finish_reason


class ChatAnswer(ChoicesAnswer):
    """A chat completion, chunk by chunk or whole."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, body: ChatBody, model: ServedModel, tokenizer: Tokenizer, tools: ToolPlan) -> None:
        super().__init__(body, model)
        self._tokenizer = tokenizer
        self._with_logprobs = bool(body.logprobs)
        self._prompt_logprobs: list[TokenLogprob] = []
        self._choices = [_Choice(tools.reader()) for _ in range(body.num_drawn)]

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def has_logprobs(self) -> bool:
        return self._with_logprobs

    def plain_text(self, index: int, output: TextOutput) -> str | None:
        choice = self._choices[index]
        has_more = choice.reader is not None or self._with_logprobs or self._shows_ids
        if has_more or not choice.started or output.finish_reason is not None:
            return None
        return output.text or None

    def plain_choice(self, index: int, text: str) -> dict[str, Any]:
        return _entry(index, {"content": text})

    def choice_chunks(self, index: int, output: TextOutput) -> list[dict[str, Any]]:
        choice = self._choices[index]
        choice.logprobs += output.logprobs
        choice.token_ids += output.token_ids
        news = deltas(choice.read(output))
        if not news and output.finish_reason is None:
            return []
        news = news or [{}]
        if not choice.started:
            news[0] = {"role": "assistant", "content": None if "tool_calls" in news[0] else "", **news[0]}
        choice.started = True
        logprobs, choice.logprobs = choice.logprobs, []
        chunks = [_entry(index, delta) for delta in news]
        if self.has_logprobs:
            chunks[0]["logprobs"] = chat_logprobs(self._tokenizer, logprobs, as_token_ids=self._names_ids)
        if self._shows_ids:
            chunks[0]["token_ids"], choice.token_ids = choice.token_ids, []
        chunks[-1] |= {"finish_reason": choice.finish_reason_of(output), "stop_reason": output.stop_reason}
        return chunks

    def add(self, index: int, output: TextOutput) -> None:
        self.score(index, output)
        choice = self._choices[index]
        choice.calls.take(choice.read(output))
        choice.logprobs += output.logprobs
        choice.token_ids += output.token_ids
        if index == 0:
            self._prompt_logprobs += output.prompt_logprobs
        choice.finish_reason, choice.stop_reason = choice.finish_reason_of(output), output.stop_reason

    def choice(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        message: dict[str, Any] = {"role": "assistant", "content": choice.calls.content, "refusal": None}
        if choice.calls.calls:
            message["tool_calls"] = choice.calls.tool_calls
        logprobs = None
        if self.has_logprobs:
            logprobs = chat_logprobs(self._tokenizer, choice.logprobs, as_token_ids=self._names_ids)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **({"token_ids": choice.token_ids} if self._shows_ids else {}),
        }

    def chunk_fields(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        is_first, choice.is_shown = not choice.is_shown, True
        return self._prompt_ids() if is_first else {}

    def whole_fields(self) -> dict[str, Any]:
        fields = self._prompt_ids()
        if self._num_scored is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._prompt_logprobs, self._num_scored)
        return fields

    def _prompt_ids(self) -> dict[str, Any]:
        if not self._shows_ids:
            return {}
        return {"prompt_token_ids": list(self.generation.choices[0].request.prompt_token_ids)}


def _entry(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    """An entry of a chunk's `choices`."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
