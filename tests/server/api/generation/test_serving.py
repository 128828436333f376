"""What every generating request goes through: room in the context, places in the queue, all or nothing."""

import dataclasses
import json

import pytest

from guanaco.server.engine.async_engine import NeverFits
from support.server.api_server import MAX_MODEL_LEN, WAIT, LiveServer, chat_body, make_state
from support.server.fake_engine import FakeTokenizer

ROUTE = "/v1/chat/completions"


def post(server: LiveServer, body: dict, status: int = 200) -> dict:
    with server.client() as client:
        response = client.post(ROUTE, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_context_limits(server: LiveServer, name: str) -> None:
    prompt = len(FakeTokenizer().encode_chat([{"role": "user", "content": "hello"}]))
    room = MAX_MODEL_LEN - prompt
    post(server, chat_body("hello", **{name: room}))
    error = post(server, chat_body("hello", **{name: room + 1}), 400)["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == name
    for number in (prompt, room, room + 1, MAX_MODEL_LEN):
        assert str(number) in error["message"]


def test_prompt_that_fills_the_context(server: LiveServer) -> None:
    room_for_one = "x" * (MAX_MODEL_LEN - 4 - 1)
    post(server, chat_body(room_for_one))
    assert server.engine.requests[-1].params.max_tokens == 1
    error = post(server, chat_body(room_for_one + "x"), 400)["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(MAX_MODEL_LEN) in error["message"]
    assert "maximum context length" in error["message"]


def test_prompt_far_beyond_the_context_is_not_tokenised(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(server.state.tokenizer, "encode_chat", never, raising=False)
    error = post(server, chat_body("x" * (MAX_MODEL_LEN * 64 + 1)), 400)["error"]
    assert error["code"] == "context_length_exceeded"


def test_prompt_that_the_engine_can_never_hold(server: LiveServer) -> None:
    server.engine.max_prompt_tokens = 3
    try:
        error = post(server, chat_body("hello"), 400)["error"]
    finally:
        server.engine.max_prompt_tokens = 10**9
    assert error["code"] == "context_length_exceeded"
    assert "9" in error["message"]
    assert "3" in error["message"]


def test_n_times_max_tokens_is_bounded(server: LiveServer) -> None:
    assert post(server, chat_body("x", n=3, max_tokens=4000), 400)["error"]["param"] == "n"
    post(server, chat_body("x", n=8))
    assert {r.params.max_tokens for r in server.engine.requests[-8:]} == {8192 // 8}


def test_cache_salt_is_a_tenant(server: LiveServer) -> None:
    salts = []
    for fields in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        post(server, chat_body("x", max_tokens=1, **fields))
        salts.append(server.engine.requests[-1].cache_salt)
    assert salts[0] == salts[1] == ""
    assert salts[2] == salts[3] != ""
    assert len(set(salts)) == 3
    assert salts[2] != "a", "a client must not be able to name another's salt"


def test_overload_before_the_stream_is_plain_json(server: LiveServer) -> None:
    server.engine.max_running = 0
    try:
        for streaming in (False, True):
            with server.client() as client:
                response = client.post(ROUTE, json=chat_body("x", stream=streaming))
            assert response.status_code == 503
            assert response.headers["retry-after"] == "3"
            assert response.json()["error"]["code"] == "server_overloaded"
    finally:
        server.engine.max_running = 10_000


def test_where_one_choice_has_no_place_none_is_begun(server: LiveServer) -> None:
    server.engine.max_running = 2
    before = len(server.engine.requests)
    try:
        assert post(server, chat_body("x", n=3), 503)["error"]["code"] == "server_overloaded"
    finally:
        server.engine.max_running = 10_000
    assert len(server.engine.requests) == before


def test_more_choices_than_may_ever_wait_are_a_400_with_the_number(server: LiveServer) -> None:
    """A 503 would have the client come back for nothing."""
    server.engine.script = dataclasses.replace(
        server.engine.script, raise_on_submit=NeverFits("3 prompts and choices at once: 2 may wait")
    )
    try:
        error = post(server, chat_body("x", n=3), 400)["error"]
    finally:
        server.engine.script = dataclasses.replace(server.engine.script, raise_on_submit=None)
    assert (error["code"], "2 may wait" in error["message"]) == ("too_many_prompts", True)


def test_more_requests_than_could_be_queued_are_refused_before_they_are_read() -> None:
    with LiveServer(make_state(max_num_seqs=1, max_queued_requests=1)) as server:
        gate = server.gate()
        with server.client() as client:
            sockets = []
            for _ in range(2):
                sockets.append(server.connect())
                body = json.dumps(chat_body("x")).encode()
                sockets[-1].sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(body) + body
                )
            server.until(lambda engine: len(engine.running) == 2)
            response = client.post(ROUTE, content=b"not even JSON")
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "server_overloaded"
            server.open(gate)
            for sock in sockets:
                assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
                sock.close()
            server.assert_quiet()
            assert client.post(ROUTE, json=chat_body("x"), timeout=WAIT).status_code == 200
