"""A client that leaves ends its generation, however it leaves and whatever it waited for."""

import json
import socket
import struct
from collections.abc import Callable

import httpx
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from guanaco.server.api.app import create_app
from support.server.api_server import BASE, LiveServer, chat_body, http_post, make_state
from support.server.fake_engine import reply_of

CHAT = "/v1/chat/completions"


def leave(sock: socket.socket) -> None:
    sock.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


ways_to_leave = pytest.mark.parametrize("go", [leave, reset])


@ways_to_leave
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_leaving_before_any_output(
    server: LiveServer, go: Callable[[socket.socket], None], streaming: bool, n: int
) -> None:
    gate, aborted = server.gate(), len(server.engine.aborted)
    tokens = server.engine.num_tokens
    sock = server.connect()
    sock.sendall(http_post(CHAT, chat_body("bye", stream=streaming, n=n)))
    server.until(lambda engine: len(engine.running) == n)
    go(sock)
    server.until(lambda engine: not engine.running)
    assert len(server.engine.aborted) == aborted + n
    server.open(gate)
    server.assert_quiet()
    assert server.engine.num_tokens == tokens, "nothing is computed for a client that is gone"
    sock.close()


STREAMS = {
    CHAT: chat_body("bye", stream=True, n=2),
    "/v1/completions": {"model": BASE, "prompt": "bye", "stream": True},
    "/v1/responses": {"model": BASE, "input": "bye", "stream": True},
    "/v1/messages": {**chat_body("bye", stream=True), "max_tokens": 50},
}


def test_five_hundred_clients_that_open_streams_and_leave() -> None:
    """Some before any output, some in the middle, some with a reset: nothing of any of them is left."""
    with LiveServer(make_state(max_num_seqs=1024)) as server:
        gate, sockets = server.gate(), []
        for number in range(500):
            path, body = list(STREAMS.items())[number % 4]
            sockets.append(server.connect())
            sockets[-1].sendall(http_post(path, body))
        server.until(lambda engine: len(engine.running) == 625)  # chat asks for two choices
        for number, sock in enumerate(sockets[:200]):
            (leave if number % 3 else reset)(sock)
        server.until(lambda engine: len(engine.running) == 375)
        server.script(step_seconds=0.05)
        server.open(gate)
        for number, sock in enumerate(sockets[200:]):
            assert b"200 OK" in sock.recv(65536)
            (leave if number % 3 else reset)(sock)
        server.assert_quiet()
        assert server.call(lambda: server.server.config.app.state.responses._running) == {}
        assert server.call(lambda: server.state.intake.num_body_bytes) == 0
        with server.client() as client:
            assert client.post(CHAT, json=chat_body("still there?")).status_code == 200
            assert client.get("/health/ready").status_code == 200


@ways_to_leave
def test_leaving_in_the_middle_of_a_stream(server: LiveServer, go: Callable[[socket.socket], None]) -> None:
    server.script(step_seconds=0.02)
    aborted, tokens = len(server.engine.aborted), server.engine.num_tokens
    sock = server.connect()
    sock.sendall(http_post(CHAT, chat_body("bye", stream=True)))
    while b"data:" not in sock.recv(65536):
        pass
    go(sock)
    server.until(lambda engine: not engine.running)
    assert len(server.engine.aborted) == aborted + 1
    produced = server.engine.num_tokens - tokens
    assert produced < len(reply_of(server.engine.requests[-1])), "it ran to its end"
    sock.close()


def test_a_client_that_has_ended_its_side_and_then_leaves(server: LiveServer) -> None:
    gate = server.gate()
    sock = server.connect()
    sock.sendall(http_post(CHAT, chat_body("bye")))
    server.until(lambda engine: len(engine.running) == 1)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(65536).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")  # is it still there?
    assert server.call(lambda: len(server.engine.running)) == 1
    sock.close()
    server.until(lambda engine: not engine.running)
    server.open(gate)


def test_others_are_not_disturbed(server: LiveServer) -> None:
    gate = server.gate()
    stay, go = server.connect(), server.connect()
    stay.sendall(http_post(CHAT, chat_body("stay", max_tokens=30)))
    server.until(lambda engine: len(engine.running) == 1)
    staying = server.engine.requests[-1]
    go.sendall(http_post(CHAT, chat_body("go", max_tokens=30)))
    server.until(lambda engine: len(engine.running) == 2)
    go.close()
    server.until(lambda engine: len(engine.running) == 1)
    server.open(gate)
    answer = json.loads(stay.makefile("rb").read().split(b"\r\n\r\n", 1)[1])
    assert answer["choices"][0]["message"]["content"] == reply_of(staying)[:30]
    stay.close()


def test_leaving_before_the_body_is_complete(server: LiveServer) -> None:
    requests = len(server.engine.requests)
    with server.connect() as sock:
        sock.sendall(http_post(CHAT, chat_body("bye"))[:-5])
    server.assert_quiet()
    assert len(server.engine.requests) == requests


def test_a_client_time_out_counts_as_leaving(server: LiveServer) -> None:
    gate = server.gate()
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=chat_body("bye"), timeout=0.1)
    server.until(lambda engine: not engine.running)
    server.open(gate)


def test_cancelled_requests_are_counted_and_logged(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "guanaco.access")
    gate = server.gate()
    sock = server.connect()
    sock.sendall(http_post(CHAT, chat_body("bye"), headers={"X-Request-Id": "gone-1"}))
    server.until(lambda engine: len(engine.running) == 1)
    sock.close()
    server.until(lambda engine: not engine.running)
    server.assert_quiet()
    server.open(gate)
    (fields,) = [r.fields for r in caplog.records if getattr(r, "fields", {}).get("request_id") == "gone-1"]
    assert (fields["status"], fields["outcome"], fields["finish_reasons"]) == (499, "cancelled", ("abort",))
    with server.client() as client:
        assert 'request_success_total{engine="0",finished_reason="abort"' in client.get("/metrics").text


def test_no_middleware_that_hides_a_disconnect(server: LiveServer) -> None:
    app = create_app(make_state())
    assert [m.cls.__name__ for m in app.user_middleware] == [
        "RequestScope",
        "HostCheck",
        "Gate",
        "PageFiles",
        "AuthMiddleware",
    ]
    assert not any(issubclass(m.cls, BaseHTTPMiddleware) for m in app.user_middleware)
