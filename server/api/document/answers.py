"""JSON schemas of the answers by name, and the name of each route's answer.

A schema lists the fields that an answer always has. An answer may have more: clients must ignore unknown fields.
"""

from collections.abc import Mapping

from guanaco.server.api.document.schemas import BOOLEAN as _BOOLEAN
from guanaco.server.api.document.schemas import COUNT as _COUNT
from guanaco.server.api.document.schemas import INTEGER as _INTEGER
from guanaco.server.api.document.schemas import NUMBER as _NUMBER
from guanaco.server.api.document.schemas import OBJECT as _OBJECT
from guanaco.server.api.document.schemas import STRING as _STRING
from guanaco.server.api.document.schemas import Schema
from guanaco.server.api.document.schemas import array as _array
from guanaco.server.api.document.schemas import const as _const
from guanaco.server.api.document.schemas import made_of as _object
from guanaco.server.api.document.schemas import or_null as _or_null
from guanaco.server.api.document.schemas import ref as _ref

_STOP_REASON: Schema = {"type": ["integer", "string", "null"]}
_TOKEN = {"token": _STRING, "logprob": _NUMBER, "bytes": _or_null(_array(_INTEGER))}
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls"]}
_HEAD = {"id": _STRING, "created": _INTEGER, "model": _STRING, "system_fingerprint": _or_null(_STRING)}

ANSWERS: Mapping[str, Schema] = {
    "Error": _object(
        error=_object(message=_STRING, type=_STRING, param=_or_null(_STRING), code=_or_null(_STRING)),
    ),
    "MessagesError": _object(
        type=_const("error"),
        error=_object(type=_STRING, message=_STRING, details=_OBJECT),
        request_id=_or_null(_STRING),
    ),
    "Usage": _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    ),
    "ToolCall": _object(id=_STRING, type=_const("function"), function=_object(name=_STRING, arguments=_STRING)),
    "ChatLogprobs": _object(
        content=_array(_object(**_TOKEN, top_logprobs=_array(_object(**_TOKEN)))), refusal={"type": "null"}
    ),
    "ChatCompletion": _object(
        **_HEAD,
        object=_const("chat.completion"),
        choices=_array(
            _object(
                index=_COUNT,
                message=_object(
                    ("tool_calls",),
                    role=_const("assistant"),
                    content=_or_null(_STRING),
                    refusal={"type": "null"},
                    tool_calls=_array(_ref("ToolCall")),
                ),
                logprobs=_or_null(_ref("ChatLogprobs")),
                finish_reason=_FINISH,
                stop_reason=_STOP_REASON,
            )
        ),
        usage=_ref("Usage"),
    ),
    "Completion": _object(
        **_HEAD,
        object=_const("text_completion"),
        choices=_array(
            _object(
                index=_COUNT,
                text=_STRING,
                logprobs=_or_null(
                    _object(
                        tokens=_array(_STRING),
                        token_logprobs=_array(_or_null(_NUMBER)),
                        top_logprobs=_array(_or_null({"type": "object", "additionalProperties": _NUMBER})),
                        text_offset=_array(_COUNT),
                    )
                ),
                finish_reason={"enum": ["stop", "length"]},
                stop_reason=_STOP_REASON,
            )
        ),
        usage=_ref("Usage"),
    ),
    "Response": _object(
        ("usage",),
        id=_STRING,
        object=_const("response"),
        created_at=_NUMBER,
        status={"enum": ["in_progress", "completed", "incomplete", "cancelled", "failed"]},
        model=_STRING,
        error=_or_null(_object(code=_STRING, message=_STRING)),
        incomplete_details=_or_null(_object(reason=_STRING)),
        instructions=_or_null(_STRING),
        metadata={"type": "object", "additionalProperties": _STRING},
        output=_array(_object(id=_STRING, type={"enum": ["message", "function_call"]}, status=_STRING)),
        parallel_tool_calls=_BOOLEAN,
        previous_response_id=_or_null(_STRING),
        store=_BOOLEAN,
        temperature=_or_null(_NUMBER),
        top_p=_or_null(_NUMBER),
        tool_choice={"type": ["string", "object"]},
        tools=_array(_OBJECT),
        usage=_or_null(_object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT)),
    ),
    "ResponseDeleted": _object(id=_STRING, object=_const("response"), deleted=_const(True)),
    "ResponseInputTokens": _object(object=_const("response.input_tokens"), input_tokens=_COUNT),
    "ResponseInputItems": _object(
        object=_const("list"),
        data=_array(_object(id=_STRING, type=_STRING)),
        first_id=_or_null(_STRING),
        last_id=_or_null(_STRING),
        has_more=_BOOLEAN,
    ),
    "Message": _object(
        id=_STRING,
        type=_const("message"),
        role=_const("assistant"),
        model=_STRING,
        content=_array(_object(type={"enum": ["text", "tool_use"]})),
        stop_reason={
            "enum": ["end_turn", "tool_use", "max_tokens", "stop_sequence", "model_context_window_exceeded", None]
        },
        stop_sequence=_or_null(_STRING),
        usage=_object(input_tokens=_COUNT, output_tokens=_COUNT),
    ),
    "MessageTokens": _object(input_tokens=_COUNT),
    "TokenIds": _object(
        ("token_strs",), count=_COUNT, max_model_len=_COUNT, tokens=_array(_COUNT), token_strs=_array(_STRING)
    ),
    "DetokenizedText": _object(prompt=_STRING),
    "TokenizerInfo": _object(
        bos_token=_or_null(_STRING),
        eos_token=_or_null(_STRING),
        pad_token=_or_null(_STRING),
        vocab_size=_COUNT,
        model_max_length=_COUNT,
        chat_template=_or_null(_STRING),
    ),
    "Model": _object(
        id=_STRING, object=_const("model"), created=_INTEGER, owned_by=_STRING, root=_STRING, parent=_or_null(_STRING)
    ),
    "ModelList": _object(object=_const("list"), data=_array(_ref("Model"))),
    "NumberedAdapters": _array(_object(id=_COUNT, path=_STRING, scale=_NUMBER)),
    "Status": _object(status=_STRING),
    "Readiness": {
        "type": "object",
        "required": ["status"],
        "properties": {"status": _STRING, "provider": _STRING, "device": _STRING, "adapter_registry": _STRING},
    },
    "Version": _object(version=_STRING),
}

# (method, path) → the name of the answer's schema; None: the answer is not JSON.
ANSWER_OF: Mapping[tuple[str, str], str | None] = {
    ("post", "/v1/chat/completions"): "ChatCompletion",
    ("post", "/v1/completions"): "Completion",
    ("post", "/v1/responses"): "Response",
    ("post", "/v1/responses/input_tokens"): "ResponseInputTokens",
    ("get", "/v1/responses/{response_id}"): "Response",
    ("delete", "/v1/responses/{response_id}"): "ResponseDeleted",
    ("post", "/v1/responses/{response_id}/cancel"): "Response",
    ("get", "/v1/responses/{response_id}/input_items"): "ResponseInputItems",
    ("post", "/v1/messages"): "Message",
    ("post", "/v1/messages/count_tokens"): "MessageTokens",
    ("post", "/tokenize"): "TokenIds",
    ("post", "/detokenize"): "DetokenizedText",
    ("get", "/tokenizer_info"): "TokenizerInfo",
    ("get", "/v1/models"): "ModelList",
    ("get", "/v1/models/{name}"): "Model",
    ("get", "/lora-adapters"): "NumberedAdapters",
    ("get", "/version"): "Version",
    ("get", "/health/live"): "Status",
    ("get", "/health/ready"): "Readiness",
    ("get", "/health"): None,
    ("get", "/metrics"): None,
}

# Path of each route that streams → a description of its events.
STREAMS: Mapping[str, str] = {
    "/v1/chat/completions": "`data:` lines with chat.completion.chunk objects, then `data: [DONE]`",
    "/v1/completions": "`data:` lines with text_completion objects, then `data: [DONE]`",
    "/v1/responses": "named events, response.created to response.completed, each with its sequence_number",
    "/v1/messages": "named events, message_start to message_stop",
}
