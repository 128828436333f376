"""Chat completions as OpenAI's reference has them: each row of fields, asked whole and as a stream.

The engine's answer depends on the request alone, so that the two ways must say the same.
"""

from typing import Any

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, PIRATE, LiveServer

ROUTE = "/v1/chat/completions"
USER: dict[str, Any] = {"role": "user", "content": "hello"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": True,
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
TEXT = {"type": "text", "text": "hello"}

# name → the body's fields; the model, the messages and max_completion_tokens: 12 are there if a row doesn't say more
ACCEPTED: dict[str, dict[str, Any]] = {
    "nothing but a model and a message": {},
    "an adapter as the model": {"model": PIRATE},
    # messages
    "a system message": {"messages": [{"role": "system", "content": "be brief"}, USER]},
    "a developer message": {"messages": [{"role": "developer", "content": "be brief"}, USER]},
    "a conversation": {"messages": [USER, {"role": "assistant", "content": "hi"}, USER]},
    "names in messages": {"messages": [{**USER, "name": "bob"}, {"role": "assistant", "content": "x", "name": "al"}]},
    "content as parts": {"messages": [{"role": "user", "content": [TEXT, TEXT]}]},
    "system content as parts": {"messages": [{"role": "system", "content": [TEXT]}, USER]},
    "developer content as parts": {"messages": [{"role": "developer", "content": [TEXT]}, USER]},
    "assistant content as parts": {"messages": [USER, {"role": "assistant", "content": [TEXT]}, USER]},
    "an assistant that refused nothing": {"messages": [USER, {"role": "assistant", "content": "x", "refusal": None}]},
    "an answer of ours sent back": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": "x",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "tool_calls": None,
            },
            USER,
        ]
    },
    "an empty user message": {"messages": [{"role": "user", "content": ""}]},
    "text beyond ASCII": {"messages": [{"role": "user", "content": "naïve 🦙 \u0000 日本"}]},
    # length
    "max_tokens": {"max_tokens": 5, "max_completion_tokens": None},
    "max_completion_tokens of one": {"max_completion_tokens": 1},
    "max_completion_tokens null": {"max_completion_tokens": None},
    "both limits": {"max_tokens": 7, "max_completion_tokens": 7},
    # sampling
    "temperature 0": {"temperature": 0},
    "temperature 2": {"temperature": 2},
    "temperature as a float": {"temperature": 0.7},
    "top_p": {"top_p": 0.5},
    "top_p 1 as an integer": {"top_p": 1},
    "seed": {"seed": 42},
    "the largest seed": {"seed": 2**63 - 1},
    "the smallest seed": {"seed": -(2**63)},
    "presence_penalty": {"presence_penalty": 1.5},
    "presence_penalty -2": {"presence_penalty": -2},
    "frequency_penalty": {"frequency_penalty": -0.5},
    "frequency_penalty 2": {"frequency_penalty": 2.0},
    "logit_bias": {"logit_bias": {"97": 100, "98": -100}},
    "logit_bias of fractions": {"logit_bias": {"97": 0.5}},
    "logit_bias empty": {"logit_bias": {}},
    # choices
    "n 2": {"n": 2},
    "n 8": {"n": 8},
    "n with a seed": {"n": 3, "seed": 1},
    # ends
    "stop as text": {"stop": " "},
    "stop as a list": {"stop": ["golf", " "]},
    "four stops": {"stop": ["a", "b", "c", "d"]},
    "stop null": {"stop": None},
    "stop of several bytes": {"stop": "🦙"},
    # log-probabilities
    "logprobs": {"logprobs": True},
    "logprobs false": {"logprobs": False},
    "top_logprobs 0": {"logprobs": True, "top_logprobs": 0},
    "top_logprobs 5": {"logprobs": True, "top_logprobs": 5},
    "top_logprobs 20": {"logprobs": True, "top_logprobs": 20},
    "logprobs of two choices": {"logprobs": True, "top_logprobs": 2, "n": 2},
    # formats
    "response_format text": {"response_format": {"type": "text"}},
    # tools
    "tools": {"tools": [TOOL]},
    "tools and auto": {"tools": [TOOL], "tool_choice": "auto"},
    "tools and none": {"tools": [TOOL], "tool_choice": "none"},
    "tools without parallel calls": {"tools": [TOOL], "parallel_tool_calls": False},
    "a tool without parameters": {"tools": [{"type": "function", "function": {"name": "now"}}]},
    "a tool with strict null": {"tools": [{"type": "function", "function": {"name": "now", "strict": None}}]},
    "a call and its result": {
        "tools": [TOOL],
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
    },
    "a call without content": {
        "tools": [TOOL],
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT],
    },
    "a result as parts": {
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {**RESULT, "content": [TEXT]}],
    },
    # what the reference has and what changes no answer here
    "user": {"user": "user-1234"},
    "safety_identifier": {"safety_identifier": "hash"},
    "prompt_cache_key": {"prompt_cache_key": "key"},
    "prompt_cache_retention": {"prompt_cache_retention": "24h"},
    "metadata": {"metadata": {"team": "a"}},
    "store": {"store": True},
    "store false": {"store": False},
    "service_tier": {"service_tier": "auto"},
    "reasoning_effort": {"reasoning_effort": "low"},
    "verbosity of the default": {"verbosity": "medium"},
    "modalities text": {"modalities": ["text"]},
    "prediction": {"prediction": {"type": "content", "content": "x"}},
    "every optional field null": dict.fromkeys(
        (
            *("audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_tokens"),
            *("metadata", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty", "seed", "stop"),
            *("reasoning_effort", "response_format", "service_tier", "store", "stream_options", "temperature", "tools"),
            *("tool_choice", "top_logprobs", "top_p", "user", "verbosity", "web_search_options"),
        )
    ),
}


def body_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": BASE, "messages": [USER], "max_completion_tokens": 12, **fields}


def ask(http: httpx.Client, fields: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(ROUTE, json=body_of(fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return shapes.chat(answer.json())


def ask_stream(http: httpx.Client, fields: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post(ROUTE, json={**body_of(fields), "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert answer.headers["x-request-id"]
    return shapes.chat_chunks(shapes.stream_of(answer.content))


def gathered(chunks: list[dict[str, Any]]) -> dict[int, tuple[str, str | None, list[Any]]]:
    """Each choice's text, finish_reason and log-probabilities."""
    found: dict[int, tuple[str, str | None, list[Any]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text, finish, entries = found.get(choice["index"], ("", None, []))
            more = (choice.get("logprobs") or {}).get("content") or []
            text += choice["delta"].get("content") or ""
            found[choice["index"]] = (text, choice["finish_reason"] or finish, entries + more)
    return found


@pytest.mark.parametrize("name", ACCEPTED)
def test_whole(http: httpx.Client, name: str) -> None:
    fields = ACCEPTED[name]
    answer = ask(http, fields)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == fields.get("model", BASE)
    assert len(answer["choices"]) == (fields.get("n") or 1)
    limit = body_of(fields)["max_completion_tokens"] or fields.get("max_tokens")
    for choice in answer["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert (choice["logprobs"] is not None) == bool(fields.get("logprobs"))
        for entry in (choice["logprobs"] or {"content": ()})["content"]:
            assert len(entry["top_logprobs"]) == fields.get("top_logprobs", 0)
        if fields.get("stop"):
            stops = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
            assert not any(stop in choice["message"]["content"] for stop in stops)
        if choice["finish_reason"] == "length":
            assert len(choice["message"]["content"]) == limit
    if limit:
        assert answer["usage"]["completion_tokens"] <= limit * len(answer["choices"])


@pytest.mark.parametrize("name", ACCEPTED)
def test_stream_says_what_the_whole_answer_says(http: httpx.Client, name: str) -> None:
    whole, chunks = ask(http, ACCEPTED[name]), ask_stream(http, ACCEPTED[name])
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert all(chunk["choices"] for chunk in chunks)
    assert not any(chunk.get("usage") for chunk in chunks)
    assert gathered(chunks) == {
        choice["index"]: (
            choice["message"]["content"],
            choice["finish_reason"],
            (choice["logprobs"] or {}).get("content") or [],
        )
        for choice in whole["choices"]
    }


@pytest.mark.parametrize("n", [1, 2])
def test_usage_comes_last_in_a_stream_that_asks_for_it(http: httpx.Client, n: int) -> None:
    whole = ask(http, {"n": n})
    *chunks, last = ask_stream(http, {"n": n, "stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("options", [{"include_usage": False}, {}, None, {"include_obfuscation": False}])
def test_usage_does_not_come_unasked(http: httpx.Client, options: Any) -> None:
    chunks = ask_stream(http, {"stream_options": options})
    assert not any(chunk.get("usage") for chunk in chunks)


def test_usage_has_the_details(http: httpx.Client, server: LiveServer) -> None:
    server.script(cached_tokens=3)
    usage = ask(http, {})["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3


def test_seed_and_fingerprint(http: httpx.Client) -> None:
    first, second = ask(http, {"seed": 7}), ask(http, {"seed": 7})
    assert first["choices"] == second["choices"]
    assert first["system_fingerprint"] == second["system_fingerprint"]
    assert first["id"] != second["id"]


def test_limits_count_what_was_made(http: httpx.Client) -> None:
    answer = ask(http, {"max_completion_tokens": 4})
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_newer_limit_wins(http: httpx.Client) -> None:
    assert ask(http, {"max_tokens": 9, "max_completion_tokens": 3})["usage"]["completion_tokens"] == 3


def test_stop_is_told_and_left_out(http: httpx.Client) -> None:
    answer = ask(http, {"stop": [" "], "max_completion_tokens": 100})
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert " " not in choice["message"]["content"]


CALL_TEXT = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'


def test_a_call_is_told_apart_from_content(http: httpx.Client, server: LiveServer) -> None:
    server.script(reply=CALL_TEXT)
    (choice,) = ask(http, {"tools": [TOOL], "max_completion_tokens": 500})["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}


def test_a_streamed_call_begins_with_its_name(http: httpx.Client, server: LiveServer) -> None:
    server.script(reply=CALL_TEXT)
    chunks = ask_stream(http, {"tools": [TOOL], "max_completion_tokens": 500})
    calls = [call for c in chunks for choice in c["choices"] for call in choice["delta"].get("tool_calls") or ()]
    assert calls[0]["index"] == 0
    assert calls[0]["type"] == "function"
    assert calls[0]["function"]["name"] == "get_weather"
    assert all("name" not in call["function"] and "id" not in call for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Rome"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text(http: httpx.Client, server: LiveServer) -> None:
    server.script(reply=CALL_TEXT)
    (choice,) = ask(http, {"max_completion_tokens": 500})["choices"]
    assert choice["message"]["content"] == CALL_TEXT
    assert not choice["message"].get("tool_calls")
