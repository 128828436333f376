"""What needs a real engine: answers whose shape is demanded, whole and streamed, from a model of random weights."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from support.models.tiny_models import make_tiny_llama
from support.server import openai_shapes as shapes
from support.server.real_server import BASE, make_real_server

ROUTE = "/v1/chat/completions"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "cellar"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "set_light", "parameters": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "set_light"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "light", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("conformance")
    model = make_tiny_llama(directory / BASE, max_position_embeddings=4096)
    with make_real_server(directory, model=model, chat_template="chatml") as live, live.client() as client:
        yield client


def ask(engine: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"model": BASE, "messages": [{"role": "user", "content": "Light?"}], "max_tokens": 300, "seed": 1, **fields}
    answer = engine.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return shapes.chat(answer.json())["choices"][0]
    chunks = shapes.chat_chunks(shapes.stream_of(answer.content))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    return {
        "finish_reason": chunks[-1]["choices"][0]["finish_reason"],
        "message": {
            "content": "".join(delta.get("content") or "" for delta in deltas) or None,
            "tool_calls": [
                {
                    "function": {
                        "name": calls[0]["function"]["name"],
                        "arguments": "".join(call["function"].get("arguments", "") for call in calls),
                    }
                }
            ]
            if calls
            else [],
        },
    }


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(engine: httpx.Client, stream: bool) -> None:
    choice = ask(engine, response_format=FORMAT, stream=stream)
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_has_to_come(engine: httpx.Client, choice: Any, stream: bool) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    given = ask(engine, **fields, stream=stream)
    assert given["finish_reason"] == "tool_calls"
    assert given["message"]["content"] is None
    (call,) = given["message"]["tool_calls"]
    assert call["function"]["name"] == "set_light"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_a_response_in_a_format(engine: httpx.Client) -> None:
    body = {
        "model": BASE,
        "input": "Light?",
        "text": {"format": {"type": "json_schema", "name": "l", "schema": SCHEMA}},
    }
    response = shapes.response(engine.post("/v1/responses", json={**body, "max_output_tokens": 300}).json())
    assert response["status"] == "completed"
    jsonschema.validate(json.loads(response["output"][0]["content"][0]["text"]), SCHEMA)


def test_logit_bias(engine: httpx.Client) -> None:
    """100 chooses a token alone."""
    (token,) = engine.post("/tokenize", json={"prompt": "b", "add_special_tokens": False}).json()["tokens"]
    body = {"model": BASE, "prompt": "a", "max_tokens": 3, "temperature": 0, "logit_bias": {str(token): 100}}
    assert shapes.completion(engine.post("/v1/completions", json=body).json())["choices"][0]["text"] == "bbb"


def test_the_greedy_token_is_the_likeliest(engine: httpx.Client) -> None:
    """The token that was chosen has exactly the largest log-probability of its place."""
    body = {"model": BASE, "prompt": "hello", "max_tokens": 5, "temperature": 0, "logprobs": 1}
    made = shapes.completion(engine.post("/v1/completions", json=body).json())["choices"][0]["logprobs"]
    for own, top in zip(made["token_logprobs"], made["top_logprobs"], strict=True):
        assert own == max(top.values())


def test_usage_counts_the_prompt_of_tokenize(engine: httpx.Client) -> None:
    counted = engine.post("/tokenize", json={"messages": [{"role": "user", "content": "Light?"}]}).json()["count"]
    body = {"model": BASE, "messages": [{"role": "user", "content": "Light?"}], "max_tokens": 1}
    assert shapes.chat(engine.post(ROUTE, json=body).json())["usage"]["prompt_tokens"] == counted
