"""best_of: more answers are made than are shown. truncate_prompt_tokens: a prompt's end, the same in /tokenize."""

from typing import Any

import httpx
import pytest

from guanaco.server.api.generation.answer import ChoicesAnswer
from guanaco.server.api.generation.protocol import MAX_CHOICES
from support.server.api_server import BASE, MAX_MODEL_LEN, LiveServer
from support.server.fake_engine import ASSISTANT, BOS, END, USER, reply_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": MESSAGES}, COMPLETIONS: {"prompt": "hello"}}
PROMPTS = {CHAT: [BOS, USER, *b"hello", END, ASSISTANT], COMPLETIONS: [BOS, *b"hello"]}


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    shared.script()
    return shared


def post(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    return client.post(route, json={"model": BASE, "max_tokens": 2, **BODIES[route], **fields})


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


@pytest.mark.parametrize(("route", "num_prompts"), [(CHAT, 1), (COMPLETIONS, 1), (COMPLETIONS, 2)])
def test_the_best_are_shown_in_order(
    server: LiveServer, client: httpx.Client, route: str, num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt has its own best; the fake's log-probabilities are all alike, so means are given here."""
    means = [-0.5, -0.2, -0.9, -0.1, -3.0, -1.0, -4.0, -2.0]
    monkeypatch.setattr(ChoicesAnswer, "_mean", lambda self, index: means[index])
    prompts = {"prompt": ["hello", "world"]} if num_prompts == 2 else {}
    before = len(server.engine.requests)
    answer = post(client, route, n=2, best_of=4, seed=7, **prompts).json()
    made = server.engine.requests[before:]
    assert len(made) == 4 * num_prompts
    assert all(request.params.logprobs == 0 for request in made), "they are compared by them"
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_prompts))
    expected = [reply_of(made[i])[:2] for i in (3, 1, 5, 7)[: 2 * num_prompts]]
    assert [text_of(choice) for choice in answer["choices"]] == expected
    assert all(choice["logprobs"] is None for choice in answer["choices"]), "nobody asked for them"
    assert answer["usage"]["completion_tokens"] == 2 * 4 * num_prompts, "all that were made"


def test_the_mean_is_of_each_token(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    means: dict[int, float] = {}
    whole = ChoicesAnswer._mean

    def mean(self: ChoicesAnswer, index: int) -> float:
        means[index] = whole(self, index)
        return means[index]

    monkeypatch.setattr(ChoicesAnswer, "_mean", mean)
    assert post(client, COMPLETIONS, best_of=2, max_tokens=3).status_code == 200
    assert means == {0: -0.125, 1: -0.125}


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    "fields", [{"best_of": 1, "n": 2}, {"best_of": MAX_CHOICES + 1}, {"best_of": 2, "stream": True}]
)
def test_wrong_values(client: httpx.Client, route: str, fields: dict) -> None:
    response = post(client, route, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "best_of")


def test_the_limit_of_all_tokens_names_the_field_that_multiplies(client: httpx.Client) -> None:
    for fields, param in (({"best_of": MAX_CHOICES}, "best_of"), ({"n": MAX_CHOICES}, "n")):
        error = post(client, COMPLETIONS, max_tokens=MAX_MODEL_LEN // 2, **fields).json()["error"]
        assert (error["param"], error["message"].startswith(f"{param} times max_tokens")) == (param, True), error


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("keep", [1, 3, 5000])
def test_the_last_tokens_of_a_prompt_are_kept(server: LiveServer, client: httpx.Client, route: str, keep: int) -> None:
    kept = PROMPTS[route][-keep:]
    assert post(client, route, truncate_prompt_tokens=keep).status_code == 200
    assert list(server.engine.requests[-1].prompt_token_ids) == kept
    assert client.post("/tokenize", json={**BODIES[route], "truncate_prompt_tokens": keep}).json()["tokens"] == kept


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("route", BODIES)
def test_minus_one_leaves_room_for_the_answer(
    server: LiveServer, client: httpx.Client, route: str, limit: int | None
) -> None:
    text = "x" * (MAX_MODEL_LEN * 3)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if route == CHAT else {"prompt": text}
    assert post(client, route, **body).status_code == 400
    fields = {**body, "max_tokens": limit, "truncate_prompt_tokens": -1}
    response = post(client, route, **fields)
    assert response.status_code == 200, response.text
    request = server.engine.requests[-1]
    assert len(request.prompt_token_ids) == MAX_MODEL_LEN - (limit or 16)
    assert request.params.max_tokens == (limit or 16)
    assert client.post("/tokenize", json=fields).json()["tokens"] == list(request.prompt_token_ids)


def test_an_echo_shows_what_was_kept(client: httpx.Client) -> None:
    fields = {"echo": True, "max_tokens": 0, "logprobs": 0}
    choice = post(client, COMPLETIONS, **fields, truncate_prompt_tokens=2).json()["choices"][0]
    assert choice["text"] == "lo"
    assert choice["logprobs"]["tokens"] == ["l", "o"]
    assert post(client, COMPLETIONS, **fields, truncate_prompt_tokens=99).json()["choices"][0]["text"] == "hello"


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("value", [0, -2, 2**31, "1", True])
def test_wrong_lengths(client: httpx.Client, route: str, value: Any) -> None:
    for response in (
        post(client, route, truncate_prompt_tokens=value),
        client.post("/tokenize", json={**BODIES[route], "truncate_prompt_tokens": value}),
    ):
        assert (response.status_code, response.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_batches_of_token_ids_with_n_echo_and_logprobs(server: LiveServer, client: httpx.Client) -> None:
    """The choices of one prompt stand together, and each begins with its own prompt and its log-probabilities."""
    fields = {"prompt": [[104, 105], [98, 121, 101]], "n": 2, "echo": True, "logprobs": 1, "seed": 1}
    before = len(server.engine.requests)
    choices = post(client, COMPLETIONS, **fields).json()["choices"]
    made = server.engine.requests[before:]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice, request, text in zip(choices, made, ("hi", "hi", "bye", "bye"), strict=True):
        assert choice["text"] == text + reply_of(request)[:2]
        logprobs = choice["logprobs"]
        assert logprobs["tokens"][: len(text)] == list(text)
        assert [value is None for value in logprobs["token_logprobs"]] == [True] + [False] * (len(text) + 1)
        assert logprobs["text_offset"][: len(text) + 1] == list(range(len(text) + 1))
    refused = post(client, COMPLETIONS, suffix="end")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert refused.json()["error"]["param"] == "suffix"
