"""Connections that dribble, flood or don't read: each is closed at its limit, and nobody else notices."""

import contextlib
import dataclasses
import json
import re
import socket
import time
from collections.abc import Iterator

import pytest

from support.server.api_server import BASE, WAIT, LiveServer, chat_body, http_post, make_state, read_all
from support.server.fake_engine import reply_of
from support.server.raw_http import CHUNKED_HEAD, GET, code_of, status_of

HEADER_SECONDS, BODY_SECONDS, KEEP_ALIVE_SECONDS = 0.4, 0.6, 0.8


@pytest.fixture(scope="module")
def impatient() -> Iterator[LiveServer]:
    """A server that waits for a fraction of a second."""
    seconds = {"header_timeout": HEADER_SECONDS, "body_timeout": BODY_SECONDS, "keep_alive_timeout": KEEP_ALIVE_SECONDS}
    with LiveServer(make_state(**seconds)) as live:
        yield live
        live.assert_quiet()


def seconds_until_closed(sock: socket.socket, dribble: bytes = b"", every: float = 0.05) -> tuple[float, bytes]:
    """Send `dribble` byte by byte until the server closes; how long that took, and what it said."""
    began = time.monotonic()
    received = b""
    sock.settimeout(every)
    while time.monotonic() - began < WAIT:
        try:
            if dribble:
                sock.send(dribble[:1])
                dribble = dribble[1:] or dribble
            data = sock.recv(65536)
            if not data:
                return time.monotonic() - began, received
            received += data
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - began, received
    raise AssertionError("the server never closed the connection")


def test_idle_connection_is_closed(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        seconds, received = seconds_until_closed(sock)
    assert received == b""
    assert seconds >= HEADER_SECONDS * 0.9


@pytest.mark.parametrize("begin", [b"", GET])
def test_dribbled_head(impatient: LiveServer, begin: bytes) -> None:
    """On a fresh connection, and on one that has been used (uvicorn's own timer ends at the first byte)."""
    with impatient.connect() as sock:
        if begin:
            sock.sendall(begin)
            assert b"1.2.3" in sock.recv(65536)
        seconds, received = seconds_until_closed(sock, b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 1000)
    assert seconds >= HEADER_SECONDS * 0.9
    assert status_of(received) in (408, 0)  # a byte sent after the end resets the connection, answer and all


def test_the_time_for_a_head_begins_with_its_first_byte(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        time.sleep(HEADER_SECONDS * 0.6)
        seconds, _ = seconds_until_closed(sock, b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 1000)
    assert seconds >= HEADER_SECONDS * 0.9


@pytest.mark.parametrize("begin", [b"", GET])
def test_dribbled_body(impatient: LiveServer, begin: bytes) -> None:
    whole = http_post("/v1/chat/completions", chat_body("x" * 1000))
    head, body = whole.split(b"\r\n\r\n", 1)
    with impatient.connect() as sock:
        if begin:
            sock.sendall(begin)
            assert b"1.2.3" in sock.recv(65536)
        sock.sendall(head + b"\r\n\r\n")
        seconds, received = seconds_until_closed(sock, body)
    assert seconds >= BODY_SECONDS * 0.9
    assert status_of(received) in (408, 0)


@pytest.mark.parametrize("length", [10, -10])
def test_half_a_request_is_told_why_it_ends(impatient: LiveServer, length: int) -> None:
    answer = impatient.raw(http_post("/v1/chat/completions", chat_body("x"))[:length])
    assert status_of(answer) == 408
    assert code_of(answer) == "request_timeout"


def test_dribbled_head_behind_a_slow_answer(impatient: LiveServer) -> None:
    """Pipelined: its time begins when the answer before it is complete, and then it is bounded too."""
    gate = impatient.gate()
    with impatient.connect() as sock:
        sock.sendall(http_post("/v1/chat/completions", chat_body("x", max_tokens=2), close=False) + b"GET / HT")
        impatient.until(lambda engine: engine.running)
        time.sleep(HEADER_SECONDS * 1.3)
        impatient.open(gate)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        seconds_until_closed(sock, b"TP/1.1\r\nX-Long: " + b"x" * 1000)
    impatient.script()


def test_dribbled_empty_lines(impatient: LiveServer) -> None:
    """They begin no request, and end uvicorn's keep-alive timer."""
    with impatient.connect() as sock:
        sock.sendall(GET)
        assert b"1.2.3" in sock.recv(65536)
        seconds_until_closed(sock, b"\r\n" * 500)


def test_kept_alive_connection_is_closed_when_idle(impatient: LiveServer) -> None:
    with impatient.connect() as sock:
        for _ in range(3):
            sock.sendall(GET)
            assert b"1.2.3" in sock.recv(65536)
        seconds, _ = seconds_until_closed(sock)
    assert seconds >= KEEP_ALIVE_SECONDS * 0.9


def test_body_that_goes_on_after_the_answer(impatient: LiveServer) -> None:
    """401, 404 or 413 come before the body is read; the rest of it may not keep the connection open for ever."""
    with impatient.connect() as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\nx")
        assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        seconds_until_closed(sock, b"x" * 1000)
    with impatient.connect() as sock:
        sock.sendall(b"POST /nope HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nx")
        assert sock.recv(65536).startswith(b"HTTP/1.1 404")
        sock.sendall(b"x" * 9)
        seconds_until_closed(sock)


def test_a_slow_answer_is_not_a_slow_client(impatient: LiveServer) -> None:
    """No limit on reading runs while the client waits for us."""
    gate = impatient.gate()
    with impatient.connect() as sock:
        sock.sendall(http_post("/v1/chat/completions", chat_body("x", max_tokens=2, stream=True)))
        impatient.until(lambda engine: engine.running)
        time.sleep(max(HEADER_SECONDS, BODY_SECONDS, KEEP_ALIVE_SECONDS) * 1.3)  # longer than any of the limits
        impatient.open(gate)
        assert b"data: [DONE]" in read_all(sock)
    impatient.script()


def ask_and_end(server: LiveServer, requests: bytes) -> bytes:
    """Send, end our side of the connection, and read to the end."""
    with server.connect() as sock:
        sock.sendall(requests)
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_client_gets_its_answer(server: LiveServer, stream: bool) -> None:
    """Also one that takes a while, and though the connection could have been kept."""
    server.script(step_seconds=0.02)
    body = chat_body("x", max_tokens=12, stream=stream)
    answer = ask_and_end(server, http_post("/v1/chat/completions", body, close=False))
    interim, _, final = answer.rpartition(b"HTTP/1.1 200 OK\r\n")
    assert interim.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"") == b""
    assert (b"data: [DONE]" if stream else b'"completion_tokens":12') in final


def test_half_closed_client_gets_every_pipelined_answer(server: LiveServer) -> None:
    bodies = [chat_body(f"number {i}", max_tokens=5 + i) for i in range(4)]
    answer = ask_and_end(server, b"".join(http_post("/v1/chat/completions", body, close=False) for body in bodies))
    assert [int(n) for n in re.findall(rb'"completion_tokens":(\d+)', answer)] == [5, 6, 7, 8]


def test_half_a_request_and_the_end_is_closed(server: LiveServer) -> None:
    for cut in (10, -10):
        assert ask_and_end(server, http_post("/v1/chat/completions", chat_body("x"))[:cut]) == b""


def old_post(body: dict, *lines: str) -> bytes:
    """A POST to chat as an HTTP/1.0 client sends it."""
    data = json.dumps(body).encode()
    head = ["POST /v1/chat/completions HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*head, *lines, "", ""]).encode() + data


def test_http_1_0_client_gets_a_whole_answer_with_its_length(server: LiveServer) -> None:
    for lines in ((), ("Connection: keep-alive",), ("Expect: 100-continue",)):
        head, body = server.raw(old_post(chat_body("x", max_tokens=3), *lines)).split(b"\r\n\r\n", 1)
        assert status_of(head) == 200
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        assert b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n"
        assert json.loads(body)["usage"]["completion_tokens"] == 3


def test_http_1_0_client_gets_a_stream_without_chunks(server: LiveServer) -> None:
    head, body = server.raw(old_post(chat_body("x", max_tokens=3, stream=True))).split(b"\r\n\r\n", 1)
    assert b"transfer-encoding" not in head.lower()
    assert b"content-length" not in head.lower()
    events = body.decode().split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    text = "".join(json.loads(event[6:])["choices"][0]["delta"].get("content") or "" for event in events[:-2])
    assert text == reply_of(server.engine.requests[-1])[:3]


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /version", 200), ("GET /metrics", 200), ("GET /health", 200), ("GET /nope", 404), ("HEAD /version", 405)],
)
def test_every_route_answers_http_1_0(server: LiveServer, request_line: str, status: int) -> None:
    head, body = server.raw(f"{request_line} HTTP/1.0\r\n\r\n".encode()).split(b"\r\n\r\n", 1)
    assert status_of(head) == status
    assert b"transfer-encoding" not in head.lower()
    length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
    assert len(body) == (0 if request_line.startswith("HEAD") else length)


def test_body_that_never_ends(server: LiveServer) -> None:
    """A chunked body far beyond the limit is cut, not read for ever."""
    head = CHUNKED_HEAD.replace(b"/v1/completions", b"/nope")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    most = (8 * 4 << 20) + (8 << 20)  # the limit, and what fits into the sockets' buffers
    sent = 0
    with server.connect() as sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(head)
        while sent <= most:
            sock.sendall(chunk)
            sent += len(chunk)
    assert sent <= most


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    bodies = [chat_body(f"number {i}", max_tokens=5 + i) for i in range(6)]
    requests = [http_post("/v1/chat/completions", body, close=i == 5) for i, body in enumerate(bodies)]
    raw = server.raw(b"".join(requests))
    answers = [json.loads(text) for text in re.findall(rb'\{"id".*?\}\}\}', raw)]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [5, 6, 7, 8, 9, 10]
    expected = [reply_of(request)[: 5 + i] for i, request in enumerate(server.engine.requests[-6:])]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected


def test_expect_continue(server: LiveServer) -> None:
    whole = http_post("/v1/chat/completions", chat_body("x", max_tokens=1), headers={"Expect": "100-continue"})
    head, body = whole.split(b"\r\n\r\n", 1)
    with server.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert status_of(read_all(sock)) == 200


def test_client_that_never_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generation runs on at its own pace; its connection is cut after a while; others go on."""
    live = LiveServer(make_state(max_model_len=200_000))
    live.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)  # inherited by every connection
    protocol = live.server.config.http
    protocol.limits = dataclasses.replace(protocol.limits, write_seconds=0.5)
    with live as server:
        monkeypatch.setattr("support.server.fake_engine.reply_of", lambda request: "x" * 3_000)
        slow = [server.connect() for _ in range(2)]
        for sock in slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(http_post("/v1/chat/completions", chat_body("slow", stream=True)))
        server.until(lambda engine: len(engine.requests) == 2)
        with server.client() as client:
            good = client.post("/v1/chat/completions", json=chat_body("good", max_tokens=50)).json()
        assert good["usage"]["completion_tokens"] == 50
        server.assert_quiet()
        for sock in slow:
            sock.close()
        assert b"guanaco_slow_clients_total 2.0" in server.state.metrics.render()[0]


def test_limits_come_from_the_settings() -> None:
    state = make_state(header_timeout=1.5, body_timeout=2.5, keep_alive_timeout=3.5, max_body_bytes=1000)
    with LiveServer(state) as server:
        limits = server.server.config.http_protocol_class.limits
        assert (limits.header_seconds, limits.body_seconds, limits.keep_alive_seconds) == (1.5, 2.5, 3.5)
        assert server.server.config.timeout_keep_alive == 3.5
        assert limits.max_body_bytes == 8000


def test_a_second_request_that_a_half_closed_client_never_ends_is_not_waited_for() -> None:
    """With an hour for a body the connection would outlast the test: what the client has ended cannot be completed."""
    one = http_post("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 1}, close=False)
    with LiveServer(make_state(body_timeout=3600.0)) as server, server.connect() as sock:
        sock.sendall(one + one[:-1])
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200") == 1
