"""An answer that goes on with the client's last message, and variables of the chat template; the same in /tokenize."""

import json
from typing import Any

import httpx
import pytest

from guanaco.server.api.values.template_variables import MAX_VARIABLES, MAX_VARIABLES_BYTES
from support.server.api_server import BASE, LiveServer
from support.server.fake_engine import ASSISTANT, BOS, END, USER

USER_TURN = {"role": "user", "content": "hi"}
PREFILL = [USER_TURN, {"role": "assistant", "content": "The"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
BEGUN = [BOS, USER, *b"hi", END, ASSISTANT, *b"The"]


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": BASE, "max_tokens": 2, "messages": PREFILL, **fields})


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"continue_final_message": True}, BEGUN),
        ({"continue_final_message": True, "add_generation_prompt": False}, BEGUN),
        ({"continue_final_message": True, "stream": True}, BEGUN),
        ({"continue_final_message": False, "add_generation_prompt": False}, [*BEGUN, END]),
        ({"continue_final_message": None, "chat_template_kwargs": None}, [*BEGUN, END, ASSISTANT]),
        ({"chat_template_kwargs": {}}, [*BEGUN, END, ASSISTANT]),
        ({"chat_template_kwargs": {"a": [1]}}, [BOS, *b'{"a": [1]}', *BEGUN[1:], END, ASSISTANT]),
    ],
)
def test_the_prompt_is_that_of_tokenize(server: LiveServer, client: httpx.Client, fields: dict, ids: list[int]) -> None:
    assert chat(client, **fields).status_code == 200
    assert list(server.engine.requests[-1].prompt_token_ids) == ids
    fields = {name: value for name, value in fields.items() if name != "stream"}
    assert client.post("/tokenize", json={"messages": PREFILL, **fields}).json()["tokens"] == ids


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"add_generation_prompt": True}, "can't both be true"),
        ({"messages": [USER_TURN]}, "role assistant"),
        ({"messages": [USER_TURN, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}, "tool_calls"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_continued(client: httpx.Client, fields: dict, words: str) -> None:
    fields = {"continue_final_message": True, **fields}
    for response in (chat(client, **fields), client.post("/tokenize", json={"messages": PREFILL, **fields})):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "continue_final_message")
        assert words in error["message"]


@pytest.mark.parametrize(
    "variables",
    [
        [],
        "x",
        *({name: 1} for name in ("messages", "tools", "documents", "bos_token", "pad_token", "strftime_now", "range")),
        {"_private": 1},
        {"a b": 1},
        {"": 1},
        {f"v{i}": i for i in range(MAX_VARIABLES + 1)},
        {"long": "x" * MAX_VARIABLES_BYTES},
    ],
    ids=lambda value: json.dumps(value)[:24],
)
def test_variables_are_bounded_and_replace_nothing(client: httpx.Client, variables: Any) -> None:
    for response in (
        chat(client, chat_template_kwargs=variables),
        client.post("/tokenize", json={"messages": PREFILL, "chat_template_kwargs": variables}),
    ):
        assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_text_completions_have_no_template(client: httpx.Client) -> None:
    for name, value in (("continue_final_message", True), ("chat_template_kwargs", {"a": 1})):
        response = client.post("/v1/completions", json={"model": BASE, "prompt": "x", name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
