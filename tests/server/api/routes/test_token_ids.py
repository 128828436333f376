"""vLLM's fields about token ids and the prompt's log-probabilities, in the places where its answers have them."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.server.api_server import BASE, LiveServer, sse_data
from support.server.fake_engine import ASSISTANT, BOS, END, EOS, USER

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = [BOS, USER, *b"hi", END, ASSISTANT]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": [PROMPT]},
}


@pytest.fixture
def client(shared: LiveServer) -> Iterator[httpx.Client]:
    shared.script(reply="abc")
    with shared.client() as client:
        yield client


def post(client: httpx.Client, route: str, **fields: Any) -> Any:
    response = client.post(route, json={"model": BASE, "max_tokens": 9, **BODIES[route], **fields})
    assert response.status_code == 200, response.text
    return response.json()


def chunks(client: httpx.Client, route: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": BASE, "max_tokens": 9, "stream": True, **BODIES[route], **fields}
    return [chunk for chunk in sse_data(client.post(route, json=body).content) if chunk != "[DONE]"]


def test_whole_answers(client: httpx.Client) -> None:
    answer = post(client, CHAT, return_token_ids=True, n=2)
    assert answer["prompt_token_ids"] == PROMPT
    assert [choice["token_ids"] for choice in answer["choices"]] == [[*b"abc", EOS]] * 2
    answer = post(client, COMPLETIONS, return_token_ids=True, prompt=[[97], [98, 99]])
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97], [98, 99]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[*b"abc", EOS]] * 2
    for route in BODIES:
        plain = post(client, route)
        assert not {"prompt_token_ids", "prompt_logprobs"} & (plain.keys() | plain["choices"][0].keys())
        assert "token_ids" not in plain["choices"][0]


@pytest.mark.parametrize("hide_every", [0, 2])
def test_streams_tell_each_id_once(shared: LiveServer, client: httpx.Client, hide_every: int) -> None:
    """Also of tokens without text, whose ids come with the next chunk; the prompt's come with the first."""
    shared.script(reply="abcdef", hide_every=hide_every)
    for route, place in ((CHAT, lambda chunk: chunk), (COMPLETIONS, lambda chunk: chunk["choices"][0])):
        events = chunks(client, route, return_token_ids=True)
        assert [i for event in events for i in event["choices"][0]["token_ids"]] == [*b"abcdef", EOS]
        assert place(events[0])["prompt_token_ids"] == PROMPT
        assert not any("prompt_token_ids" in place(event) for event in events[1:])


def test_tokens_are_named_by_their_ids(client: httpx.Client) -> None:
    asked = {"return_tokens_as_token_ids": True}
    entries = post(client, CHAT, logprobs=True, top_logprobs=1, **asked)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["token_id:97", "token_id:98", "token_id:99", f"token_id:{EOS}"]
    assert entries[0]["bytes"] == [97]
    assert entries[0]["top_logprobs"][0]["token"] == "token_id:97"
    logprobs = post(client, COMPLETIONS, logprobs=2, **asked)["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["token_id:97", "token_id:98"]
    assert logprobs["top_logprobs"][0] == {"token_id:97": -0.125, "token_id:98": -0.25}
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    streamed = chunks(client, CHAT, logprobs=True, **asked)[0]["choices"][0]["logprobs"]["content"]
    assert streamed[0]["token"] == "token_id:97"


def test_the_prompts_log_probabilities(client: httpx.Client) -> None:
    whole = post(client, CHAT, prompt_logprobs=1)["prompt_logprobs"]
    scored = post(client, COMPLETIONS, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert whole == scored
    assert len(whole) == len(PROMPT)
    assert whole[0] is None
    assert whole[2] == {"104": {"logprob": -0.125, "rank": 1, "decoded_token": "h"}}
    two = post(client, COMPLETIONS, prompt_logprobs=2)["choices"][0]["prompt_logprobs"][2]
    assert two["105"] == {"logprob": -0.25, "rank": 2, "decoded_token": "i"}


def test_beside_an_echo_each_has_its_own_number(client: httpx.Client) -> None:
    choice = post(client, COMPLETIONS, echo=True, logprobs=1, prompt_logprobs=3)["choices"][0]
    assert len(choice["prompt_logprobs"][2]) == 3
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * (len(PROMPT) - 1 + 4)
    choice = post(client, COMPLETIONS, echo=True, logprobs=3, prompt_logprobs=0)["choices"][0]
    assert len(choice["prompt_logprobs"][2]) == 1
    assert len(choice["logprobs"]["top_logprobs"][2]) == 3


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"return_token_ids": 1}, "return_token_ids"),
    ],
)
def test_wrong_values(client: httpx.Client, route: str, fields: dict, param: str) -> None:
    response = client.post(route, json={"model": BASE, **BODIES[route], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_the_size_of_an_answer_is_bounded(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from guanaco.server.api.generation import sampling

    monkeypatch.setattr(sampling, "MAX_PROMPT_LOGPROBS", 3 * len(PROMPT))
    for route in BODIES:
        for num, status in ((2, 200), (3, 400)):
            body = {"model": BASE, "max_tokens": 1, **BODIES[route], "prompt_logprobs": num}
            assert client.post(route, json=body).status_code == status
