"""POST /tokenize, POST /detokenize, GET /tokenizer_info: the tokenizer over HTTP, in vLLM's shapes.

Used by lm-eval, which then needs no copy of the tokenizer, and by vllm-router's cache-aware policy.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.body import body_schema, take_fields
from guanaco.server.api.generation.catalog import Caller
from guanaco.server.api.generation.conversation import PromptEnding, render_messages, tool_plan
from guanaco.server.api.generation.ignored import Ignored
from guanaco.server.api.generation.protocol import (
    DETOKENIZE_FIELDS,
    MAX_TOKENS,
    TOKENIZE_CHAT_FIELDS,
    TOKENIZE_PROMPT_FIELDS,
    DetokenizeBody,
    TokenizeBody,
)
from guanaco.server.api.generation.sampling import num_tokens_kept
from guanaco.server.api.generation.serving import (
    check_text_size,
    check_token_ids,
    encode_raw,
    model_to_look_at,
    serve_tokens,
)
from guanaco.server.api.generation.state import ApiState, json_response, state_of
from guanaco.server.api.http.errors import bad_request

router = APIRouter(tags=["tokens"])


@router.post("/tokenize", summary="Text or messages to token ids", openapi_extra=body_schema(TokenizeBody))
async def tokenize(request: Request) -> Response:
    return await serve_tokens(request, _tokenize)


@router.post("/detokenize", summary="Token ids to text", openapi_extra=body_schema(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    return await serve_tokens(request, _detokenize)


@router.get("/tokenizer_info", summary="Special tokens, sizes and chat template of the tokenizer")
async def tokenizer_info(request: Request) -> Response:
    """The chat template is the one for chats with the base: that of --chat-template, or the model's own."""
    state = state_of(request)
    tokenizer, base = state.tokenizer, state.catalog.base
    template = state.template_for(base)
    eos_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    return json_response(
        {
            "bos_token": None if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
            "eos_token": None if eos_id is None else tokenizer.token_text(eos_id),
            "pad_token": None,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": base.max_model_len,
            "chat_template": None if template is None else template.source,
        }
    )


def _tokenize(state: ApiState, caller: Caller, data: dict[str, Any]) -> tuple[dict[str, Any], Ignored]:
    """The ids that chat or completions would use for the same body. Fields that these routes refuse are refused here,
    too."""
    if (data.get("prompt") is None) == (data.get("messages") is None):
        raise bad_request("give either prompt or messages", "prompt")
    fields = take_fields(data, TOKENIZE_PROMPT_FIELDS if data.get("messages") is None else TOKENIZE_CHAT_FIELDS)
    body = fields.validate(TokenizeBody)
    model = model_to_look_at(state, body, caller)
    max_model_len = model.max_model_len
    if body.messages is not None:
        template = state.template_for(model)
        token_ids = list(
            render_messages(
                state,
                template,
                body.messages,
                max_model_len,
                tools=tool_plan(state, template, body),
                ending=PromptEnding.of(body),
                max_tokens=MAX_TOKENS,
                keep=num_tokens_kept(body, max_model_len),
            )
        )
    else:
        assert body.prompt is not None
        check_text_size(len(body.prompt.encode()), max_model_len, "prompt")
        token_ids = encode_raw(state, body.prompt, body.add_special_tokens, MAX_TOKENS)
        if len(token_ids) > MAX_TOKENS:
            raise bad_request(f"the prompt comes to more than {MAX_TOKENS} tokens: send less at once", "prompt")
        check_token_ids(state, token_ids, "prompt")
        if (keep := num_tokens_kept(body, max_model_len)) is not None:
            token_ids = token_ids[-keep:]
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [state.tokenizer.token_text(token) for token in token_ids]
    return answer, fields.ignored


def _detokenize(state: ApiState, caller: Caller, data: dict[str, Any]) -> tuple[dict[str, Any], Ignored]:
    fields = take_fields(data, DETOKENIZE_FIELDS)
    body = fields.validate(DetokenizeBody)
    if body.model is not None:
        state.catalog.get(body.model, caller.key)  # all models share one tokenizer, but an unknown name is an error
    # A model may sample ids that its tokenizer lacks (rows that pad its embeddings). They have no text.
    known = max(state.tokenizer.vocab_size, state.num_token_ids)
    if any(token >= known for token in body.tokens):
        raise bad_request(f"a token id is beyond the vocabulary: token ids must be below {known}", "tokens")
    text = state.tokenizer.decode(body.tokens, skip_special_tokens=bool(body.skip_special_tokens))
    return {"prompt": text}, fields.ignored
