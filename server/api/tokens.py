"""POST /tokenize, POST /detokenize, GET /tokenizer_info: the tokenizer over HTTP, in vLLM's shapes.

Asked for by lm-eval (so that it needs no copy of the tokenizer) and by vllm-router's cache-aware policy.
"""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.auth import ApiKey
from guanaco.server.api.body import body_schema, parse_object, read_body, validate
from guanaco.server.api.chat import render_messages
from guanaco.server.api.errors import bad_request
from guanaco.server.api.protocol import DetokenizeBody, TokenizeBody
from guanaco.server.api.serving import check_text_size
from guanaco.server.api.state import ApiState, json_response, state_of

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", summary="Text or messages to token ids", openapi_extra=body_schema(TokenizeBody))
async def tokenize(request: Request) -> Response:
    state = state_of(request)
    body = await read_body(request, state.settings.max_body_bytes)
    answer = await asyncio.get_running_loop().run_in_executor(
        state.workers, _tokenize, state, request.scope.get("guanaco.key"), body
    )
    return json_response(answer)


@router.post("/detokenize", summary="Token ids to text", openapi_extra=body_schema(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    state = state_of(request)
    body = await read_body(request, state.settings.max_body_bytes)
    return json_response(await asyncio.get_running_loop().run_in_executor(state.workers, _detokenize, state, body))


@router.get("/tokenizer_info", summary="Special tokens and sizes of the tokenizer")
async def tokenizer_info(request: Request) -> Response:
    tokenizer = state_of(request).tokenizer
    eos_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    return json_response(
        {
            "bos_token": None if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
            "eos_token": None if eos_id is None else tokenizer.token_text(eos_id),
            "pad_token": None,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": state_of(request).catalog.base.max_model_len,
        }
    )


def _tokenize(state: ApiState, key: ApiKey | None, raw: bytes) -> dict[str, Any]:
    body = validate(TokenizeBody, parse_object(raw))
    model = state.catalog.base if body.model is None else state.catalog.get(body.model, key)
    max_model_len = model.max_model_len
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt")
    if body.messages is not None:
        with_generation_prompt = body.add_generation_prompt is not False
        token_ids = list(
            render_messages(
                state,
                state.template_for(model),
                body.messages,
                max_model_len,
                add_generation_prompt=with_generation_prompt,
            )
        )
    else:
        assert body.prompt is not None
        check_text_size(len(body.prompt.encode()), max_model_len, "prompt")
        token_ids = state.tokenizer.encode(body.prompt, add_bos=False if body.add_special_tokens is False else None)
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [state.tokenizer.token_text(token) for token in token_ids]
    return answer


def _detokenize(state: ApiState, raw: bytes) -> dict[str, Any]:
    body = validate(DetokenizeBody, parse_object(raw))
    if any(token >= state.tokenizer.vocab_size for token in body.tokens):
        raise bad_request(f"a token id is beyond the vocabulary of {state.tokenizer.vocab_size}", "tokens")
    return {"prompt": state.tokenizer.decode(body.tokens, skip_special_tokens=False)}
