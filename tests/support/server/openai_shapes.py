"""OpenAI's published shapes: bodies and chunks checked by the types of its own package, and by what it always sends.

The package builds its objects leniently: a client never sees that a field is missing. Here every object is validated,
and the fields that the reference calls required must be there even where the package's type would do without.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

# Required by the reference. The package's types have a default for the ones that may be null.
_CHAT = ("id", "object", "created", "model", "choices", "usage")
_CHAT_CHOICE = ("index", "message", "finish_reason", "logprobs")
_CHAT_MESSAGE = ("role", "content", "refusal")
_CHUNK = ("id", "object", "created", "model", "choices")
_CHUNK_CHOICE = ("index", "delta", "finish_reason")
_COMPLETION = ("id", "object", "created", "model", "choices")
_COMPLETION_CHOICE = ("index", "text", "logprobs", "finish_reason")
_USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
_TOKEN = ("token", "logprob", "bytes")
_RESPONSE = (
    *("id", "object", "created_at", "status", "error", "incomplete_details", "instructions", "metadata", "model"),
    *("output", "parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p"),
)
_MODEL = ("id", "object", "created", "owned_by")
_ERROR_TYPES = ("invalid_request_error", "rate_limit_error", "server_error", "authentication_error")


def has(data: Mapping[str, Any], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in data]
    assert not missing, f"{missing} missing in {data}"


def check_usage(usage: Mapping[str, Any]) -> None:
    has(usage, _USAGE)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] >= 1


def check_logprob(entry: Mapping[str, Any]) -> None:
    has(entry, (*_TOKEN, "top_logprobs"))
    for token in (entry, *entry["top_logprobs"]):
        has(token, _TOKEN)
        assert token["logprob"] <= 0
        assert token["bytes"] is None or all(0 <= byte < 256 for byte in token["bytes"])
    ranked = [top["logprob"] for top in entry["top_logprobs"]]
    assert ranked == sorted(ranked, reverse=True)


def chat(data: dict[str, Any]) -> dict[str, Any]:
    """A whole chat completion."""
    ChatCompletion.model_validate(data)
    has(data, _CHAT)
    assert data["id"].startswith("chatcmpl-")
    assert type(data["created"]) is int
    check_usage(data["usage"])
    for index, choice in enumerate(data["choices"]):
        has(choice, _CHAT_CHOICE)
        has(choice["message"], _CHAT_MESSAGE)
        assert choice["index"] == index
        for entry in (choice["logprobs"] or {}).get("content") or ():
            check_logprob(entry)
    return data


def chat_chunks(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All chunks of one chat completion."""
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        has(chunk, _CHUNK)
        for choice in chunk["choices"]:
            has(choice, _CHUNK_CHOICE)
            for entry in (choice.get("logprobs") or {}).get("content") or ():
                check_logprob(entry)
        if chunk.get("usage"):
            check_usage(chunk["usage"])
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1, name
    check_order(chunks)
    firsts: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            firsts.setdefault(choice["index"], choice["delta"])
            if choice["delta"] is not firsts[choice["index"]]:
                assert "role" not in choice["delta"], "the role is told once"
    assert all(delta["role"] == "assistant" for delta in firsts.values())
    return chunks


def check_order(chunks: list[dict[str, Any]]) -> None:
    """Each choice ends once, and nothing of it comes after its end."""
    ended: set[int] = set()
    seen: set[int] = set()
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert choice["index"] not in ended, "a choice went on after its finish_reason"
            seen.add(choice["index"])
            if choice["finish_reason"] is not None:
                ended.add(choice["index"])
    assert ended == seen == set(range(len(seen)))


def _as_typed(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice with what OpenAI sends and its package's type leaves out: the first token of an echoed prompt has no
    log-probability (null), and only the last chunk has a finish_reason."""
    changed = {**choice, "finish_reason": choice["finish_reason"] or "stop"}
    if (logprobs := choice["logprobs"]) and logprobs["token_logprobs"] and logprobs["token_logprobs"][0] is None:
        assert logprobs["top_logprobs"][0] is None
        names = ("token_logprobs", "top_logprobs")
        changed["logprobs"] = logprobs | {name: logprobs[name][1:] for name in names}
    return changed


def completion(data: dict[str, Any]) -> dict[str, Any]:
    """A whole text completion."""
    Completion.model_validate({**data, "choices": list(map(_as_typed, data["choices"]))})
    assert all(choice["finish_reason"] for choice in data["choices"])
    has(data, (*_COMPLETION, "usage"))
    assert data["id"].startswith("cmpl-")
    check_usage(data["usage"])
    for index, choice in enumerate(data["choices"]):
        has(choice, _COMPLETION_CHOICE)
        assert choice["index"] == index
        check_completion_logprobs(choice)
    return data


def completion_chunks(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All chunks of one text completion."""
    for chunk in chunks:
        Completion.model_validate({**chunk, "choices": list(map(_as_typed, chunk["choices"]))})
        has(chunk, _COMPLETION)
        for choice in chunk["choices"]:
            has(choice, _COMPLETION_CHOICE)
            check_completion_logprobs(choice)
        if chunk.get("usage"):
            check_usage(chunk["usage"])
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1, name
    check_order(chunks)
    return chunks


def check_completion_logprobs(choice: Mapping[str, Any]) -> None:
    """Four lists of one length, and offsets that never go back."""
    if (logprobs := choice["logprobs"]) is None:
        return
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    has(logprobs, names)
    assert len({len(logprobs[name]) for name in names}) == 1
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(value is None or value <= 0 for value in logprobs["token_logprobs"])


def model(data: dict[str, Any]) -> dict[str, Any]:
    Model.model_validate(data)
    has(data, _MODEL)
    return data


def response(data: dict[str, Any]) -> dict[str, Any]:
    """A whole response of /v1/responses."""
    Response.model_validate(data)
    has(data, _RESPONSE)
    assert data["id"].startswith("resp_")
    ids = [item["id"] for item in data["output"]]
    assert len(set(ids)) == len(ids)
    for item in data["output"]:
        has(item, ("id", "type", "status"))
        if item["type"] == "message":
            has(item, ("role", "content"))
            for part in item["content"]:
                has(part, ("type", "text", "annotations"))
    if usage := data.get("usage"):
        has(usage, ("input_tokens", "input_tokens_details", "output_tokens", "output_tokens_details", "total_tokens"))
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    return data


def response_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All events of one streamed response: numbered from 0, begun once, ended once."""
    for event in events:
        _EVENT.validate_python(event)
        if "response" in event:
            response(event["response"])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    ends = ("response.completed", "response.incomplete", "response.failed")
    assert [kind for kind in kinds if kind in ends] == kinds[-1:]
    return events


def error(data: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's envelope: one object with four members, and a text that says something. Returns what is in it."""
    assert set(data) == {"error"}
    inner = data["error"]
    assert set(inner) == {"message", "type", "param", "code"}
    assert isinstance(inner["message"], str)
    assert len(inner["message"]) > 10
    assert inner["type"] in _ERROR_TYPES
    assert inner["param"] is None or isinstance(inner["param"], str)
    assert inner["code"] is None or isinstance(inner["code"], str)
    return inner


def sse_lines(body: bytes) -> list[str]:
    """The data of each event of a chat or completion stream, [DONE] included: `data: …` LF LF, and nothing else."""
    assert body.endswith(b"\n\n")
    assert b"\r" not in body
    lines = body.decode().removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def stream_of(body: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well: [DONE] comes once, last."""
    *chunks, done = sse_lines(body)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def named_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a responses stream: each has a name, which its data repeats as `type`."""
    events = []
    for part in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
