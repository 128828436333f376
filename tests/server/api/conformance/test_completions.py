"""Text completions as OpenAI's reference has them: each row of fields, asked whole and as a stream."""

from typing import Any

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, PIRATE
from support.server.fake_engine import BOS

ROUTE = "/v1/completions"
IDS = [BOS, *b"hello"]

# name → the body's fields; the model, a prompt and max_tokens: 12 are there if a row doesn't say more
ACCEPTED: dict[str, dict[str, Any]] = {
    "a text": {},
    "an adapter as the model": {"model": PIRATE},
    "one text in a list": {"prompt": ["hello"]},
    "two texts": {"prompt": ["hello", "bye"]},
    "token ids": {"prompt": IDS},
    "two lists of token ids": {"prompt": [IDS, [BOS, 104]]},
    "one list of token ids in a list": {"prompt": [IDS]},
    "an empty text": {"prompt": ""},
    "max_tokens not given": {"max_tokens": None},
    "one token": {"max_tokens": 1},
    "echo": {"echo": True},
    "echo false": {"echo": False},
    "echo of token ids": {"echo": True, "prompt": IDS},
    "echo of two texts": {"echo": True, "prompt": ["hello", "bye"]},
    "echo alone": {"echo": True, "max_tokens": 0},
    "echo alone of token ids": {"echo": True, "max_tokens": 0, "prompt": [IDS, IDS]},
    "logprobs 0": {"logprobs": 0},
    "logprobs 1": {"logprobs": 1},
    "logprobs 5": {"logprobs": 5},
    "logprobs with echo": {"logprobs": 2, "echo": True},
    "logprobs of a prompt": {"logprobs": 1, "echo": True, "max_tokens": 0},
    "logprobs of prompts as token ids": {"logprobs": 1, "echo": True, "max_tokens": 0, "prompt": [IDS, IDS]},
    "n 3": {"n": 3},
    "n 2 of two prompts": {"n": 2, "prompt": ["hello", "bye"]},
    "best_of 1": {"best_of": 1},
    "best_of as n": {"best_of": 2, "n": 2},
    "temperature 0": {"temperature": 0},
    "temperature 2": {"temperature": 2},
    "top_p": {"top_p": 0.1},
    "seed": {"seed": 3},
    "presence_penalty": {"presence_penalty": 2},
    "frequency_penalty": {"frequency_penalty": -2},
    "logit_bias": {"logit_bias": {"50": -100}},
    "stop as text": {"stop": " "},
    "stop as a list": {"stop": [" ", "golf"]},
    "suffix null": {"suffix": None},
    "suffix empty": {"suffix": ""},
    "user": {"user": "user-1"},
    "every optional field null": dict.fromkeys(
        (
            *("best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty"),
            *("seed", "stop", "stream_options", "suffix", "temperature", "top_p"),
        )
    ),
}


def body_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": BASE, "prompt": "hello", "max_tokens": 12, **fields}


def ask(http: httpx.Client, fields: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(ROUTE, json=body_of(fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return shapes.completion(answer.json())


def ask_stream(http: httpx.Client, fields: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post(ROUTE, json={**body_of(fields), "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    return shapes.completion_chunks(shapes.stream_of(answer.content))


def num_prompts(fields: dict[str, Any]) -> int:
    prompt = fields.get("prompt", "hello")
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def texts_of(fields: dict[str, Any]) -> list[str]:
    prompts = fields.get("prompt", "hello")
    prompts = prompts if num_prompts(fields) > 1 or (isinstance(prompts, list) and prompts[0] != BOS) else [prompts]
    return [p if isinstance(p, str) else bytes(i for i in p if i < 256).decode() for p in prompts]


@pytest.mark.parametrize("name", ACCEPTED)
def test_whole(http: httpx.Client, name: str) -> None:
    fields = ACCEPTED[name]
    answer = ask(http, fields)
    n = fields.get("n") or 1
    limit = body_of(fields)["max_tokens"]
    limit = 16 if limit is None else limit
    assert answer["object"] == "text_completion"
    assert answer["model"] == fields.get("model", BASE)
    assert len(answer["choices"]) == n * num_prompts(fields)
    for choice in answer["choices"]:
        prompt = texts_of(fields)[choice["index"] // n]
        echoed = prompt if fields.get("echo") else ""
        assert choice["text"].startswith(echoed)
        if choice["finish_reason"] == "length":
            assert len(choice["text"]) == len(echoed) + limit
        assert (choice["logprobs"] is not None) == (fields.get("logprobs") is not None)
        if logprobs := choice["logprobs"]:
            assert logprobs["text_offset"][0] == 0
            # Tokens that are no text of their own are one entry: the likeliest of them.
            tops = [top for top in logprobs["top_logprobs"] if top is not None]
            assert all(len(top) >= fields["logprobs"] or "\ufffd" in top for top in tops)
            assert (logprobs["token_logprobs"][0] is None) == bool(fields.get("echo"))
    assert answer["usage"]["completion_tokens"] <= limit * len(answer["choices"])


def test_best_of_more_than_n(http: httpx.Client) -> None:
    """All that were made count as tokens of the completion, and results cannot be streamed."""
    answer = ask(http, {"best_of": 3, "n": 2, "temperature": 2, "max_tokens": 4})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 3 * 4
    assert http.post(ROUTE, json={**body_of({"best_of": 3}), "stream": True}).status_code == 400


@pytest.mark.parametrize("name", ACCEPTED)
def test_stream_says_what_the_whole_answer_says(http: httpx.Client, name: str) -> None:
    whole, chunks = ask(http, ACCEPTED[name]), ask_stream(http, ACCEPTED[name])
    found: dict[int, tuple[str, str | None, list[Any]]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text, finish, tokens = found.get(choice["index"], ("", None, []))
            more = (choice["logprobs"] or {}).get("tokens") or []
            found[choice["index"]] = (text + choice["text"], choice["finish_reason"] or finish, tokens + more)
    assert found == {
        choice["index"]: (choice["text"], choice["finish_reason"], (choice["logprobs"] or {}).get("tokens") or [])
        for choice in whole["choices"]
    }
    assert not any(chunk.get("usage") for chunk in chunks)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"prompt": ["a", "b"]}, {"echo": True, "max_tokens": 0}])
def test_usage_comes_last_in_a_stream_that_asks_for_it(http: httpx.Client, fields: dict[str, Any]) -> None:
    *chunks, last = ask_stream(http, {**fields, "stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["usage"] == ask(http, fields)["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_sixteen_tokens_where_none_are_named(http: httpx.Client) -> None:
    assert ask(http, {"max_tokens": None})["usage"]["completion_tokens"] == 16


def test_prompts_are_counted_once_each(http: httpx.Client) -> None:
    one, two = ask(http, {"prompt": [IDS]}), ask(http, {"prompt": [IDS, IDS]})
    assert two["usage"]["prompt_tokens"] == 2 * one["usage"]["prompt_tokens"] == 2 * len(IDS)


def test_token_ids_are_the_text_that_they_stand_for(http: httpx.Client) -> None:
    assert ask(http, {"prompt": IDS})["choices"] == ask(http, {"prompt": "hello"})["choices"]
