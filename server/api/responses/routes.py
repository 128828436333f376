"""POST /v1/responses: an answer that the server keeps for a while. GET, DELETE and cancel act on kept responses."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.body import body_schema, renamed_errors, take_fields
from guanaco.server.api.generation.catalog import Caller
from guanaco.server.api.generation.conversation import (
    chat_body,
    prepare_conversation,
    render_messages,
    tool_plan,
)
from guanaco.server.api.generation.encode import encode
from guanaco.server.api.generation.ignored import Ignored
from guanaco.server.api.generation.protocol import ChatBody, SamplingExtensions
from guanaco.server.api.generation.serving import Prepared, key_of, model_to_look_at, serve, serve_tokens
from guanaco.server.api.generation.state import ApiState, encoded_response, json_response, state_of
from guanaco.server.api.http.auth import ApiKey
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.api.responses.answer import ResponsesAnswer, encode_response
from guanaco.server.api.responses.items import chat_format, chat_messages, chat_tools, read_input
from guanaco.server.api.responses.protocol import RESPONSE_FIELDS, ResponseBody
from guanaco.server.api.responses.store import ResponseStore, StoredItem, StoredResponse

router = APIRouter(tags=["responses"])

DEFAULT_PAGE, MAX_PAGE = 20, 100  # input items
# Chat's name of a field → that of the Responses API.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "response_format": "text.format",
}
_ECHOED = {"text": "text.format"}  # field of the response → the client's
# Fields with the same name and meaning in chat.
_SAME = ("model", "temperature", "top_p", "top_k", "stop", "adapters", *SamplingExtensions.model_fields)


@router.post(
    "/v1/responses", summary="Answer, and keep the answer for a while", openapi_extra=body_schema(ResponseBody)
)
async def create(request: Request) -> Response:
    return await serve(request, partial(prepare_response, _store(request)))


@router.post(
    "/v1/responses/input_tokens",
    summary="Count the tokens of a response's input",
    openapi_extra=body_schema(ResponseBody),
)
async def input_tokens(request: Request) -> Response:
    return await serve_tokens(request, partial(_count, _store(request)))


@router.get("/v1/responses/{response_id}", summary="A response that was kept, or that is being made")
async def retrieve(request: Request, response_id: str) -> Response:
    if request.query_params.get("stream", "false").lower() not in ("false", "0", ""):
        text = "stream: the events of a response can't be read again; leave it out to get the whole response"
        raise bad_request(text, "stream", ErrorCode.UNSUPPORTED_PARAMETER)
    store, owner = _store(request), _owner(key_of(request))
    if (running := store.running(response_id, owner)) is not None:
        return encoded_response(await _off_loop(request, encode_response, running.snapshot()))
    return encoded_response(_ended(store, response_id, owner).content)


@router.delete("/v1/responses/{response_id}", summary="Forget a response")
async def delete(request: Request, response_id: str) -> Response:
    if not _store(request).delete(response_id, _owner(key_of(request))):
        raise _not_found()
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", summary="End a response that is being made")
async def cancel(request: Request, response_id: str) -> Response:
    """A response that has ended is returned as it is, so that cancelling twice does no harm."""
    store, owner = _store(request), _owner(key_of(request))
    if (running := store.running(response_id, owner)) is not None:
        await running.cancel()
        return encoded_response(await _off_loop(request, running.last_state))
    return encoded_response(_ended(store, response_id, owner).content)


@router.get("/v1/responses/{response_id}/input_items", summary="What a response was an answer to, page by page")
async def input_items(request: Request, response_id: str) -> Response:
    query = request.query_params
    limit, order = query.get("limit", str(DEFAULT_PAGE)), query.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= MAX_PAGE):
        raise bad_request(f"limit must be an integer from 1 to {MAX_PAGE}", "limit")
    if order not in ("asc", "desc"):
        raise bad_request("order must be asc or desc", "order")
    stored = _ended(_store(request), response_id, _owner(key_of(request)))
    items = stored.input_items if order == "asc" else stored.input_items[::-1]
    if (after := query.get("after")) is not None:
        ids = [item.id for item in items]
        if after not in ids:
            raise bad_request("after must be the id of one of the items", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    return encoded_response(await _off_loop(request, _page, page, len(items) > len(page)))


def _page(items: Sequence[StoredItem], has_more: bool) -> bytes:
    """A page of items as JSON: each item is copied as it was kept."""
    return encode(
        {
            "object": "list",
            "data": [orjson.Fragment(item.json) for item in items],
            "first_id": items[0].id if items else None,
            "last_id": items[-1].id if items else None,
            "has_more": has_more,
        }
    )


async def _off_loop(request: Request, function: Callable[..., bytes], *args: object) -> bytes:
    """Run `function`, which writes an answer that may be large, on a worker thread."""
    state = state_of(request)
    return await state.answer_work.run(state.lane(key_of(request)), function, *args)


def prepare_response(
    store: ResponseStore, state: ApiState, caller: Caller, data: dict[str, Any], admission: Admission
) -> tuple[Prepared, ResponsesAnswer]:
    """Validate and tokenise. Runs on a worker thread."""
    fields = take_fields(data, RESPONSE_FIELDS)
    body = fields.validate(ResponseBody)
    if body.top_logprobs and body.num_logprobs is None:
        raise bad_request("top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
    items, chat = _conversation(store, body, data, caller)
    with renamed_errors(_NAMES):
        prepared = prepare_conversation(state, caller, chat, admission, fields.ignored)
    is_kept = body.store is not False and store.limits.seconds > 0
    tokenizer = None if body.num_logprobs is None else state.tokenizer
    head = _head(body, data, prepared, is_kept=is_kept)
    kept_in = store if is_kept else None
    answer = ResponsesAnswer(head, items, _owner(caller.key), kept_in, tokenizer, prepared.tools.reader())
    return replace(prepared, names=_NAMES, keeps_stream=True), answer


def _count(
    store: ResponseStore, state: ApiState, caller: Caller, data: dict[str, Any]
) -> tuple[dict[str, Any], Ignored]:
    fields = take_fields(data, RESPONSE_FIELDS)
    _, chat = _conversation(store, fields.validate(ResponseBody), data, caller)
    model = model_to_look_at(state, chat, caller)
    with renamed_errors(_NAMES):
        template = state.template_for(model)
        tools = tool_plan(state, template, chat)
        token_ids = render_messages(state, template, chat.messages, model.max_model_len, tools=tools)
    return {"object": "response.input_tokens", "input_tokens": len(token_ids)}, fields.ignored


def _conversation(
    store: ResponseStore, body: ResponseBody, data: dict[str, Any], caller: Caller
) -> tuple[tuple[StoredItem, ...], ChatBody]:
    """(all input items, those of the previous responses first; the conversation in chat's shape)."""
    items = read_input(body.input, lambda: store.items(_owner(caller.key)))
    kept = tuple(StoredItem(item["id"], orjson.dumps(item)) for item in items)
    if body.previous_response_id is not None:
        previous = _previous(store, body.previous_response_id, _owner(caller.key))
        before = (*previous.input_items, *previous.output_items)
        items = [orjson.loads(item.json) for item in before] + items
        kept = (*before, *kept)
    chat: dict[str, Any] = {name: data[name] for name in _SAME if name in data}
    chat["messages"] = chat_messages(body.instructions, items)
    chat["max_tokens"] = body.max_output_tokens
    chat["tools"], chat["tool_choice"] = chat_tools(body.tools), body.tool_choice
    chat["parallel_tool_calls"] = body.parallel_tool_calls
    chat["response_format"] = None if body.text is None else chat_format(body.text.format)
    chat["stream"], chat["user"] = body.stream, body.user
    if body.num_logprobs is not None:
        chat["logprobs"], chat["top_logprobs"] = True, body.num_logprobs
    return kept, chat_body(chat, _NAMES)


def _previous(store: ResponseStore, response_id: str, owner: str) -> StoredResponse:
    if (stored := store.get(response_id, owner)) is not None:
        return stored
    text = (
        "there is no response with the id of previous_response_id: it has expired, was deleted, was not kept (store: "
        "false), was made before the server's last start, is still being made, or belongs to another API key; send the "
        "whole conversation as input instead"
    )
    raise bad_request(text, "previous_response_id", ErrorCode.PREVIOUS_RESPONSE_NOT_FOUND)


def _head(body: ResponseBody, data: dict[str, Any], prepared: Prepared, *, is_kept: bool) -> dict[str, Any]:
    """The fields of the response that are known before any output."""
    params = prepared.prompts[0].params
    text = body.text
    max_tool_calls = data.get("max_tool_calls")
    head = {
        "model": prepared.model.name,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "metadata": body.metadata or {},
        "store": is_kept,
        "background": False,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": max_tool_calls if type(max_tool_calls) is int else None,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "text": {
            "format": (None if text is None else text.format) or {"type": "text"},
            "verbosity": (None if text is None else text.verbosity) or "medium",
        },
        "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled",
        "service_tier": "default",
        "user": body.user,
    }
    return {name: orjson.Fragment(_repeated(value, _ECHOED.get(name, name))) for name, value in head.items()}


def _repeated(value: object, param: str) -> bytes:
    """The JSON of a field that the answer repeats, encoded once on a worker thread. Raises a 400 if orjson can't encode
    it."""
    try:
        return orjson.dumps(value)
    except TypeError:
        text = f"{param} has an integer of more than 64 bits, or is nested too deeply, to be repeated in the answer"
        raise bad_request(text, param) from None


def _ended(store: ResponseStore, response_id: str, owner: str) -> StoredResponse:
    if (stored := store.get(response_id, owner)) is None:
        raise _not_found()
    return stored


def _not_found() -> ApiError:
    text = (
        "there is no such response: it has expired, was deleted, was not kept (store: false), was made before the "
        "server's last start, or belongs to another API key"
    )
    return ApiError(404, ErrorCode.RESPONSE_NOT_FOUND, text, param="response_id")


def _owner(key: ApiKey | None) -> str:
    return "" if key is None else key.id


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store
