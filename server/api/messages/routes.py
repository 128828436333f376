"""POST /v1/messages: a message of the assistant. POST /v1/messages/count_tokens: how long its prompt would be."""

from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.body import body_schema, renamed_errors, take_fields
from guanaco.server.api.generation.catalog import Caller
from guanaco.server.api.generation.conversation import PromptEnding, prepare_conversation, render_messages, tool_plan
from guanaco.server.api.generation.ignored import Ignored
from guanaco.server.api.generation.protocol import MAX_TOKENS
from guanaco.server.api.generation.serving import Prepared, model_to_look_at, serve, serve_tokens
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.api.messages.answer import MessagesAnswer
from guanaco.server.api.messages.protocol import COUNT_FIELDS, MESSAGES_FIELDS, CountBody, MessagesBody
from guanaco.server.api.messages.translate import NAMES, conversation

router = APIRouter(tags=["messages"])

_BETA_HEADER = "anthropic-beta"


@router.post(
    "/v1/messages", summary="Answer a conversation, as Anthropic does", openapi_extra=body_schema(MessagesBody)
)
async def messages(request: Request) -> Response:
    return await serve(request, partial(prepare_message, _BETA_HEADER in request.headers))


@router.post(
    "/v1/messages/count_tokens", summary="Count the tokens of a conversation", openapi_extra=body_schema(CountBody)
)
async def count_tokens(request: Request) -> Response:
    return await serve_tokens(request, partial(_count, _BETA_HEADER in request.headers))


def prepare_message(
    is_beta: bool, state: ApiState, caller: Caller, data: dict[str, Any], admission: Admission
) -> tuple[Prepared, MessagesAnswer]:
    """Validate and tokenise. Runs on a worker thread. is_beta: the client asks for features under development.

    max_tokens is compulsory and means "at most", so a value beyond the context is lowered to the room in it.
    """
    fields = take_fields(data, MESSAGES_FIELDS)
    body = fields.validate(MessagesBody)
    chat = conversation(body, data)
    with renamed_errors(NAMES):
        ignored = _with_beta(fields.ignored, is_beta)
        prepared = prepare_conversation(state, caller, chat, admission, ignored, fit_into_context=True)
    return replace(prepared, names=NAMES), MessagesAnswer(
        body, prepared.model, prepared.tools.reader(), caller.request_id
    )


def _count(is_beta: bool, state: ApiState, caller: Caller, data: dict[str, Any]) -> tuple[dict[str, Any], Ignored]:
    fields = take_fields(data, COUNT_FIELDS)
    chat = conversation(fields.validate(CountBody), data)
    model = model_to_look_at(state, chat, caller)
    with renamed_errors(NAMES):
        template = state.template_for(model)
        token_ids = render_messages(
            state,
            template,
            chat.messages,
            model.max_model_len,
            tools=tool_plan(state, template, chat),
            ending=PromptEnding.of(chat),
            max_tokens=MAX_TOKENS,
        )
    return {"input_tokens": len(token_ids)}, _with_beta(fields.ignored, is_beta)


def _with_beta(ignored: Ignored, is_beta: bool) -> Ignored:
    """Add the header that asks for features under development to the ignored fields: this server has none of them."""
    return ignored.and_also(_BETA_HEADER) if is_beta else ignored
