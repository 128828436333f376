"""The API over the real engine and scheduler: what only shows where both meet."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from support.server.api_server import (
    BASE,
    MAX_MODEL_LEN,
    PIRATE,
    PIRATE_VERSION,
    TERSE,
    TERSE_VERSION,
    WAIT,
    chat_body,
    http_post,
    read_all,
    sse_data,
)
from support.server.engine_server import EngineServer, make_engine_server, text_of
from support.server.fake_engine import BOS, FakeTokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineServer]:
    with make_engine_server(keys=()) as live:
        yield live


@pytest.fixture
def server(shared: EngineServer) -> Iterator[EngineServer]:
    yield shared
    shared.model.going.set()
    shared.model.not_a_number_after = None
    shared.assert_quiet()


def chat_ids(text: str) -> tuple[int, ...]:
    return tuple(FakeTokenizer().encode_chat([{"role": "user", "content": text}]))


def test_official_client_streams_base_and_adapters(server: EngineServer) -> None:
    with OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        for model, version in ((BASE, ""), (PIRATE, PIRATE_VERSION), (TERSE, TERSE_VERSION)):
            messages = [{"role": "user", "content": "hello"}]
            chunks = list(
                client.chat.completions.create(
                    model=model, messages=messages, max_tokens=50, stream=True, stream_options={"include_usage": True}
                )
            )
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == text_of(chat_ids("hello"), version, 50)
            assert chunks[-1].usage.completion_tokens == 50


def test_stop_string_across_tokens_is_not_leaked(server: EngineServer) -> None:
    full = text_of(chat_ids("stop"), "", 60)
    stop = full[20:24]
    with server.client() as client:
        whole = client.post(CHAT, json=chat_body("stop", max_tokens=60, stop=stop)).json()["choices"][0]
        raw = client.post(CHAT, json=chat_body("stop", max_tokens=60, stop=stop, stream=True)).content
    expected = full[: full.index(stop)]
    assert whole["message"]["content"] == expected
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", stop)
    chunks = [event["choices"][0] for event in sse_data(raw)[:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == expected


def test_prefix_cache_hits_are_reported_and_counted(server: EngineServer) -> None:
    body = chat_body("x" * 200, max_tokens=1)
    with server.client() as client:
        first = client.post(CHAT, json=body).json()["usage"]
        second = client.post(CHAT, json=body).json()["usage"]
        other_tenant = client.post(CHAT, json={**body, "cache_salt": "other"}).json()["usage"]
        other_model = client.post(CHAT, json={**body, "model": PIRATE}).json()["usage"]
        metrics = client.get("/metrics").text
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] >= 192
    assert other_tenant["prompt_tokens_details"]["cached_tokens"] == 0
    assert other_model["prompt_tokens_details"]["cached_tokens"] == 0
    assert 'vllm:prefix_cache_hits_total{engine="0",model_name="org/base-model"} 0.0' not in metrics


@pytest.mark.parametrize("streaming", [False, True])
def test_leaving_frees_blocks_within_a_step(server: EngineServer, streaming: bool) -> None:
    server.model.going.clear()
    sock = server.connect()
    sock.sendall(http_post(CHAT, chat_body("bye", stream=streaming, max_tokens=4000)))
    server.wait(lambda: server.scheduler.running)
    steps = server.model.num_steps
    sock.close()
    server.wait(lambda: server.state.lifecycle.num_open == 0)
    server.model.going.set()
    server.assert_quiet()
    assert server.model.num_steps - steps <= 2, "the step that was running, and at most one more"


def test_not_a_number_ends_one_request_only(server: EngineServer) -> None:
    server.model.going.clear()
    good = server.connect()
    good.sendall(http_post(CHAT, chat_body("good", max_tokens=3)))
    bad = server.connect()
    bad.sendall(http_post(CHAT, chat_body("bad", max_tokens=50, stream=True)))
    server.wait(lambda: server.state.lifecycle.num_open == 2)
    server.model.not_a_number_after = 10
    server.model.going.set()
    assert json.loads(read_all(good).split(b"\r\n\r\n")[1])["usage"]["completion_tokens"] == 3
    received = read_all(bad)
    assert b'"code":"numerical_error"' in received
    assert b"[DONE]" not in received
    good.close()
    bad.close()


def test_completion_logprobs_count_every_token(server: EngineServer) -> None:
    with server.client() as client:
        body = {"model": BASE, "prompt": "abc", "max_tokens": 20, "logprobs": 1}
        choice = client.post(COMPLETIONS, json=body).json()["choices"][0]
    text = text_of((BOS, *b"abc"), "", 20)
    assert choice["text"] == text
    assert choice["logprobs"]["tokens"] == list(text)
    assert choice["logprobs"]["text_offset"] == list(range(20))


def test_gauges_return_to_zero(server: EngineServer) -> None:
    with server.client() as client:
        client.post(CHAT, json={**chat_body("x", max_tokens=5), "model": PIRATE})
        server.assert_quiet()
        text = client.get("/metrics").text
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{gauge}{{engine="0",model_name="{BASE}"}} 0.0' in text
    assert 'running_lora_adapters="",waiting_lora_adapters=""' in text
    assert "guanaco_engine_heartbeat_age_seconds 0.0" in text


def test_queue_and_prefill_times_are_measured(server: EngineServer) -> None:
    def seconds(name: str, what: str = "sum") -> float:
        name = f"vllm:request_{name}_time_seconds_{what}"
        return server.state.metrics.registry.get_sample_value(name, {"model_name": BASE, "engine": "0"})

    names = ("queue", "prefill", "decode", "inference")
    before = {name: (seconds(name), seconds(name, "count")) for name in names}
    with server.client() as client:
        client.post(CHAT, json=chat_body("x", max_tokens=5))
    server.assert_quiet()
    took = {name: seconds(name) - before[name][0] for name in names}
    assert all(seconds(name, "count") == before[name][1] + 1 for name in names)
    assert all(0 < took[name] < WAIT for name in names)
    assert took["prefill"] + took["decode"] == pytest.approx(took["inference"])


def test_hundred_streams_over_three_models(server: EngineServer) -> None:
    """Each gets exactly its own tokens, though they share steps, blocks and two adapter slots."""
    versions = {BASE: "", PIRATE: PIRATE_VERSION, TERSE: TERSE_VERSION}
    sockets = []
    server.model.going.clear()
    for i in range(100):
        model = list(versions)[i % 3]
        sockets.append((i, model, server.connect()))
        sockets[-1][2].sendall(http_post(CHAT, {**chat_body(f"user {i}", stream=True, max_tokens=12), "model": model}))
    server.wait(lambda: server.num_in_engine == 100)
    server.model.going.set()
    for i, model, sock in sockets:
        received = read_all(sock)
        sock.close()
        lines = [line.strip() for line in received.split(b"\n") if line.startswith(b"data: {")]
        chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == text_of(chat_ids(f"user {i}"), versions[model], 12)
        assert received.count(b"data: [DONE]") == 1


@pytest.mark.parametrize("cap", [{"max_queued_requests": 2}, {"max_queued_tokens": 11}])
def test_full_queue_and_its_deadline(cap: dict) -> None:
    """One runs, two wait, the fourth is refused; those that wait longer than the queue's deadline are refused too."""
    with make_engine_server(max_num_seqs=1, max_num_batched_tokens=64, queue_timeout=0.3, **cap) as server:
        server.model.going.clear()
        sockets = []
        for waiting in range(3):
            sockets.append(server.connect())
            sockets[-1].sendall(http_post(CHAT, chat_body("x", max_tokens=3)))
            server.wait(lambda admitted=waiting + 1: server.state.lifecycle.num_admitted == admitted)
            server.wait(lambda: server.scheduler.running)
        with server.client() as client:
            response = client.post(CHAT, json=chat_body("x"))
            assert (response.status_code, response.json()["error"]["code"]) == (503, "server_overloaded")
            assert int(response.headers["retry-after"]) >= 1
        server.run(asyncio.sleep(0.35))
        server.model.going.set()
        answers = [read_all(sock) for sock in sockets]
        assert sorted(answer[9:12] for answer in answers) == [b"200", b"503", b"503"]
        for answer in answers:
            if answer[9:12] == b"503":
                assert b'"code":"queue_timeout"' in answer
                assert b"retry-after" in answer.lower()
        server.assert_quiet()


@pytest.mark.parametrize("failure", [SystemExit(3), KeyboardInterrupt()])
def test_engine_thread_that_dies(failure: BaseException) -> None:
    with make_engine_server() as server:
        server.model.going.clear()
        sockets = [server.connect() for _ in range(8)]
        for i, sock in enumerate(sockets):
            sock.sendall(http_post(CHAT, chat_body("x", stream=i % 2 == 0)))
        server.wait(lambda: server.num_in_engine == 8)
        server.model.fail = failure
        server.model.going.set()
        for sock in sockets:
            received = read_all(sock)
            assert received.startswith(b"HTTP/1.1 500")
            assert b"error" in received
            assert b"[DONE]" not in received
            sock.close()
        server.join()
        assert server.server.exit_code == 70


def test_engine_that_is_stuck() -> None:
    with make_engine_server(step_timeout=0.3) as server:
        server.model.going.clear()
        with server.connect() as sock:
            sock.sendall(http_post(CHAT, chat_body("x", stream=True)))
            assert b'"code":"engine_unavailable"' in read_all(sock)
        server.model.going.set()
        server.join()
        assert server.server.exit_code == 70


def test_prompt_for_the_last_token_of_the_context(server: EngineServer) -> None:
    with server.client() as client:
        body = {"model": BASE, "prompt": [97] * (MAX_MODEL_LEN - 1)}
        answer = client.post(COMPLETIONS, json=body).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"
