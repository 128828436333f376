"""Chunks that have nothing new but a text are made around a frame: the same bytes as a chunk that is made in full."""

import re
from typing import Any

import pytest

from guanaco.server.api.generation.answer import ChoicesAnswer
from guanaco.server.api.routes.chat import ChatAnswer
from guanaco.server.api.routes.completions import CompletionAnswer
from support.server.api_server import BASE, LiveServer

ROUTES = {"/v1/chat/completions": ChatAnswer, "/v1/completions": CompletionAnswer}
TEXT = 'hé "quoted" \\ 🦙\n\ttab'
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def streamed(server: LiveServer, path: str, fields: dict[str, Any]) -> list[bytes]:
    prompt = {"messages": [{"role": "user", "content": TEXT}]} if "chat" in path else {"prompt": TEXT}
    with server.client() as client:
        response = client.post(path, json={"model": BASE, **prompt, "max_tokens": 30, "stream": True, **fields})
    assert response.status_code == 200, response.text
    # Several choices come in any order; their chunks' running usage depends on it.
    data = re.sub(rb'"(id)":"[^"]*"|"(created)":\d+', rb"\1\2", response.content)
    return sorted(data.split(b"\n\n")) if fields.get("n") else data.split(b"\n\n")


BOTH: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"n": 3, "stop": ["q"]},
    {"return_token_ids": True},
]
CHAT = [*BOTH, {"tools": [WEATHER]}, {"logprobs": True}]
TEXTS = [*BOTH, {"echo": True, "stream_options": {"include_usage": True}}, {"logprobs": 1}]
CASES = [("/v1/chat/completions", fields) for fields in CHAT] + [("/v1/completions", fields) for fields in TEXTS]


@pytest.mark.parametrize(("path", "fields"), CASES, ids=str)
def test_the_bytes_are_those_of_full_chunks(
    server: LiveServer, path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []
    plain_event = ChoicesAnswer._plain_event

    def counted(answer: ChoicesAnswer, index: int, text: str) -> bytes:
        made.append(event := plain_event(answer, index, text))
        return event

    monkeypatch.setattr(ChoicesAnswer, "_plain_event", counted)
    quick = streamed(server, path, fields)
    has_more = {"return_token_ids", "tools", "logprobs"} & set(fields)
    assert len(made) == 0 if has_more else len(made) > 10, "the frame is used where it can be"
    monkeypatch.setattr(ROUTES[path], "plain_text", lambda *_: None)
    assert quick == streamed(server, path, fields)
