"""Large answers: bounded before anything is generated, written in pieces and off the loop."""

import json
import threading
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.server.api.generation import logprobs
from guanaco.server.api.generation.encode import encode
from guanaco.server.api.responses import routes as responses_routes
from guanaco.server.api.routes.completions import CompletionAnswer
from guanaco.server.commands import serve
from guanaco.server.config import Settings, SettingsError
from support.server.api_server import BASE, LiveServer, chat_body, make_state, sse_data

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_encoded_as_orjson_does(value: Any) -> None:
    assert encode(value) == orjson.dumps(value)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 512, 513, 1000])
def test_lists_of_any_length_are_encoded_as_orjson_does(count: int) -> None:
    value = {"choices": [{"logprobs": {"content": [{"token": str(i), "top": [i]} for i in range(count)]}}]}
    assert encode(value) == orjson.dumps(value)


def test_no_piece_of_a_long_list_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[object] = []
    dumps = orjson.dumps

    def seen(value: object) -> bytes:
        pieces.append(value)
        return dumps(value)

    monkeypatch.setattr("guanaco.server.api.generation.encode.orjson.dumps", seen)
    encode({"choices": [{"logprobs": {"content": list(range(10_000))}}]})
    assert max(len(piece) for piece in pieces if isinstance(piece, list)) <= 256


def post(server: LiveServer, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    with server.client() as client:
        response = client.post(path, json=body)
    return response.status_code, response.json()


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "hello", "max_tokens": 4, **fields}


@pytest.mark.parametrize(
    ("fields", "most", "param"),
    [
        ({"prompt": ["a", "b"], "n": 2, "max_tokens": 4}, {"max_answer_tokens": 16}, "max_tokens"),
        ({"prompt": ["a", "b"], "n": 2, "logprobs": 2, "max_tokens": 4}, {"max_answer_logprobs": 48}, "logprobs"),
        # "hello" with BOS is six tokens: 2 × 6 × (1 + 2) for the prompts and 2 × 4 × (1 + 2) for what follows
        ({"n": 2, "logprobs": 2, "echo": True}, {"max_answer_logprobs": 60}, "logprobs"),
        ({"n": 2, "logprobs": 2, "echo": True, "stream": True}, {"max_answer_logprobs": 36}, "logprobs"),
    ],
)
def test_one_more_than_an_answer_may_have_is_refused(fields: dict, most: dict[str, int], param: str) -> None:
    body = completion(**fields)
    with LiveServer(make_state(**most)) as server, server.client() as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    (name, count), *_ = most.items()
    with LiveServer(make_state(**{name: count - 1})) as server:
        status, answer = post(server, "/v1/completions", body)
        assert (status, answer["error"]["param"]) == (400, param)
        assert str(count) in answer["error"]["message"]
        assert str(count - 1) in answer["error"]["message"]
        assert not server.engine.requests, "refused before any work"


def test_an_answer_is_shorter_where_the_client_says_no_length() -> None:
    with LiveServer(make_state(max_answer_logprobs=30, max_answer_tokens=100)) as server:
        assert post(server, "/v1/chat/completions", chat_body("x", logprobs=True, top_logprobs=2))[0] == 200
        assert server.engine.requests[-1].params.max_tokens == 10
        assert post(server, "/v1/chat/completions", chat_body("x", n=2))[0] == 200
        assert server.engine.requests[-1].params.max_tokens == 50
        assert post(server, "/v1/chat/completions", chat_body("x", min_tokens=101))[0] == 400
        # a stream is not kept
        with server.client() as client:
            client.post("/v1/chat/completions", json=chat_body("x", logprobs=True, stream=True, max_tokens=90))
        assert server.engine.requests[-1].params.max_tokens == 90


class Seen:
    """On which threads log-probabilities are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: set[threading.Thread] = set()
        original = logprobs._text

        def text(raw: bytes) -> str:
            self.threads.add(threading.current_thread())
            return original(raw)

        monkeypatch.setattr(logprobs, "_text", text)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_whole_answers_with_logprobs_are_written_off_the_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    body = completion(logprobs=3, n=2) if path == "/v1/completions" else chat_body(logprobs=True, top_logprobs=3, n=2)
    with LiveServer(make_state()) as server:
        status, answer = post(server, path, body)
        assert status == 200
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert all(choice["logprobs"] for choice in answer["choices"])
        assert list(answer) == ["id", "created", "model", "system_fingerprint", "object", "choices", "usage"]
        assert seen.threads
        assert server.call(threading.current_thread) not in seen.threads


def test_a_long_prompts_logprobs_are_streamed_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    body = completion(prompt="x" * 200, logprobs=1, echo=True, stream=True, max_tokens=1)
    with LiveServer(make_state()) as server, server.client() as client:
        events = sse_data(client.post("/v1/completions", json=body).content)
        assert events[-1] == "[DONE]"
        tokens = [token for e in events[:-1] for c in e["choices"] for token in c["logprobs"]["tokens"]]
        assert len(tokens) == 1 + 200 + 1
        assert server.call(threading.current_thread) not in seen.threads


def test_the_list_of_models_is_written_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    with LiveServer(make_state()) as server, server.client() as client:
        original = server.state.catalog.all

        def seen(key: object) -> object:
            threads.append(threading.current_thread())
            return original(key)

        monkeypatch.setattr(server.state.catalog, "all", seen)
        assert json.loads(client.get("/v1/models").content)["object"] == "list"
        assert server.call(threading.current_thread) not in threads
        assert threads


def test_a_refused_allocation_is_a_503_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(value: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("guanaco.server.api.generation.answer.encode", refused)
    with LiveServer(make_state()) as server:
        status, answer = post(server, "/v1/chat/completions", chat_body("x", logprobs=True))
        assert (status, answer["error"]["code"]) == (503, "out_of_memory")
        server.assert_quiet()
    assert any("unforeseen error" in record.message for record in caplog.records)


def test_a_crash_leaves_its_stacks_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code may end the process where an allocation is refused: then the log must not be empty."""
    enabled: list[str] = []

    def stop(settings: object) -> None:
        assert enabled, "before anything is loaded"
        raise SettingsError("stop")

    monkeypatch.setattr(serve.faulthandler, "enable", lambda: enabled.append("enabled"))
    monkeypatch.setattr(serve, "bind", stop)
    with pytest.raises(SettingsError):
        serve.run_server(Settings(port=0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_echo_is_copied_once_and_off_the_loop(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Each token that comes is put behind the prompt's text, which may be megabytes: not by copying it."""
    whole: list[bool] = []
    threads: list[threading.Thread] = []
    take, add = CompletionAnswer._take, CompletionAnswer.add

    def seen_add(answer: CompletionAnswer, index: int, output: Any) -> None:
        add(answer, index, output)
        choice = answer._choices[index]
        whole.append(choice.pending[:1] == [] or choice.pending[0] is choice.prompt.text or len(choice.pending[0]) < 9)

    def seen_take(answer: CompletionAnswer, index: int) -> dict[str, Any]:
        if answer._choices[index].pending[:1] == [answer._choices[index].prompt.text]:
            threads.append(threading.current_thread())
        return take(answer, index)

    monkeypatch.setattr(CompletionAnswer, "add", seen_add)
    monkeypatch.setattr(CompletionAnswer, "_take", seen_take)
    prompt = "long " * 20_000
    body = completion(prompt=prompt, echo=True, max_tokens=20, n=2, stream=stream)
    with LiveServer(make_state(max_model_len=200_000)) as server, server.client() as client:
        answer = client.post("/v1/completions", json=body)
        if stream:
            assert answer.text.count(prompt) == 2
        else:
            assert all(choice["text"].startswith(prompt) for choice in answer.json()["choices"])
        assert len(whole) >= (4 if stream else 40)  # the first and the last output of a stream are not plain
        assert all(whole)
        assert len(threads) == 2
        assert server.call(threading.current_thread) not in threads


def test_a_streamed_response_keeps_its_logprobs_and_so_has_a_limit() -> None:
    body = {"model": BASE, "input": "x", "stream": True, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with LiveServer(make_state(max_answer_logprobs=30)) as server, server.client() as client:
        assert client.post("/v1/responses", json=body).status_code == 200
        assert server.engine.requests[-1].params.max_tokens == 10
        refused = client.post("/v1/responses", json={**body, "max_output_tokens": 11})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")


class Dumped:
    """The largest texts that orjson writes at once on one thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[threading.Thread, int] = {}
        dumps = orjson.dumps

        def seen(value: object) -> bytes:
            made = dumps(value)
            thread = threading.current_thread()
            self.sizes[thread] = max(len(made), self.sizes.get(thread, 0))
            return made

        monkeypatch.setattr("guanaco.server.api.generation.encode.orjson.dumps", seen)  # of all modules


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_with_many_logprobs_is_written_in_pieces(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Its last events repeat all of them, and it is kept: no step of that may hold the event loop for all of it."""
    dumped = Dumped(monkeypatch)
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 20, "max_output_tokens": 1000}
    with LiveServer(make_state(max_model_len=200_000)) as server, server.client() as client:
        server.script(reply="word " * 200)
        made = client.post("/v1/responses", json={"model": BASE, "input": "x", "stream": stream, **fields})
        size = len(made.content)
        final = json.loads(made.text.rpartition("data: ")[2])["response"] if stream else made.json()
        kept = client.get(f"/v1/responses/{final['id']}")
        assert kept.json() == final
        items = client.get(f"/v1/responses/{final['id']}/input_items").json()["data"]
        assert [item["role"] for item in items] == ["user"]
        assert len(final["output"][0]["content"][0]["logprobs"]) == 1000
        assert size > 900_000
        assert max(dumped.sizes.values()) < 600_000, "256 tokens with 20 alternatives at most"
        if not stream:
            assert dumped.sizes[server.call(threading.current_thread)] < 100_000, "whole answers: off the loop"


def test_a_running_response_with_many_logprobs_is_read_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    encode_it = responses_routes.encode_response

    def seen(response: Any) -> bytes:
        threads.append(threading.current_thread())
        return encode_it(response)

    monkeypatch.setattr(responses_routes, "encode_response", seen)
    body = {"model": BASE, "input": "x", "stream": True, "include": ["message.output_text.logprobs"], "top_logprobs": 5}
    with LiveServer(make_state()) as server, server.client() as client:
        server.script(step_seconds=0.02)
        with client.stream("POST", "/v1/responses", json=body) as stream:
            first = json.loads(next(line for line in stream.iter_lines() if line.startswith("data: "))[6:])
            seen_now = client.get(f"/v1/responses/{first['response']['id']}").json()
        assert seen_now["status"] == "in_progress"
        assert threads
        assert server.call(threading.current_thread) not in threads
        server.assert_quiet()
