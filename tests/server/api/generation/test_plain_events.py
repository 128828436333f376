"""Chunks that have nothing new but a text are made around a frame: the same bytes as a chunk that is made in full."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from guanaco.server.api.generation.answer import ChoicesAnswer
from guanaco.server.api.generation.protocol import ChatBody, CompletionBody
from guanaco.server.api.generation.serving import Prompt
from guanaco.server.api.routes.chat import ChatAnswer
from guanaco.server.api.routes.completions import CompletionAnswer
from guanaco.server.api.tools.plan import ToolPlan
from guanaco.server.engine.request_stream import TextOutput
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


def made_answer(path: str) -> ChoicesAnswer:
    nothing = cast(Any, None)
    model = cast(Any, SimpleNamespace(name=BASE, fingerprint="f"))
    if "chat" in path:
        chat = ChatBody.model_validate({"model": BASE, "messages": [{"role": "user", "content": "hi"}]})
        return ChatAnswer(chat, model, nothing, ToolPlan())
    text = CompletionBody.model_validate({"model": BASE, "prompt": "hi"})
    tokenizer = cast(Any, SimpleNamespace(special_ids=frozenset()))
    return CompletionAnswer(text, model, tokenizer, (Prompt((1,), nothing, None),))


@pytest.mark.parametrize("path", ROUTES)
def test_an_output_without_text_makes_no_chunk(path: str) -> None:
    """Half a character, say, at the beginning and later."""
    answer = made_answer(path)
    events = [
        answer.events(0, TextOutput(text, (1,), (), (), None, None, None, 1, 0, number))
        for number, text in enumerate(("", "a", "", "b"), 1)
    ]
    assert [event.count(b"data: ") for event in events] == [0, 1, 0, 1]
