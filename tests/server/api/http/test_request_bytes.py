"""Requests that are malformed or too large: each gets its status, and the next client notices nothing."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.server.api_server import BASE, WAIT, LiveServer, http_post, read_all
from support.server.raw_http import CHUNKED_HEAD, GET, code_of, status_of


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (32 << 10) + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(101)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: %s\r\n" % (i, b"y" * 700) for i in range(50)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (8 << 20), 431),
        (b"GET / HTTP/1.1\r\n" + b"x" * (1 << 20), 431),
        (b"GET /" + b"x" * (8 << 10) + b" HTTP/1.1\r\nHost: t\r\n\r\n", 414),
        (b"GET /" + b"x" * (1 << 20), 414),
        (b"GET /version HTTP/1.1\r\nHost: t\r\n" + b"X: y\r\n" * 98 + b"Connection: close\r\n\r\n", 200),
        (b"GET /version HTTP/1.1\r\nHost: t\r\nConnection: close\r\nX: " + b"x" * (31 << 10) + b"\r\n\r\n", 200),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, bytes) else None,
)
def test_size_of_the_head(server: LiveServer, request_bytes: bytes, status: int) -> None:
    answers: list[bytes] = []
    with server.connect() as sock:
        reader = threading.Thread(target=lambda: answers.append(read_all(sock)))
        reader.start()
        try:
            sock.sendall(request_bytes)
        except (ConnectionResetError, BrokenPipeError):
            assert status != 200
        reader.join(WAIT)
    # the server resets a client that goes on sending; its answer may then be lost
    assert status_of(answers[0]) == status or (len(request_bytes) > (1 << 19) and answers[0] == b"")
    if answers[0] and status != 200:
        assert code_of(answers[0]) in ("headers_too_large", "uri_too_long")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\n X: folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.0\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /version HTTP/0.9\r\nHost: t\r\n\r\n",
        b"GET /version HTTP/2.0\r\nHost: t\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n",
        b"CONNECT example.com:80 HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 100,
    ],
)
def test_malformed_requests(server: LiveServer, request_bytes: bytes) -> None:
    def count() -> float:
        registry = server.state.metrics.registry
        return registry.get_sample_value("guanaco_rejected_total", {"reason": "malformed_request"}) or 0

    before = count()
    answer = server.raw(request_bytes)
    assert status_of(answer) == 400, answer
    assert count() == before + 1
    assert code_of(answer) == "malformed_request"
    with server.client() as client:
        assert client.get("/version").status_code == 200


_GOOD = http_post("/v1/completions", {"model": BASE, "prompt": "x", "max_tokens": 1}, close=False)
_CHUNKED = b'POST /tokenize HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n2\r\n1}\r\n0\r\n\r\n'
_parts = st.one_of(
    st.sampled_from(
        [
            b"\r\n",
            b"\r\n\r\n",
            b" ",
            b":",
            b"\x00",
            b"Content-Length: 5\r\n",
            b"Connection: upgrade\r\n",
            b"Upgrade: h2c\r\n",
        ]
    ),
    st.binary(max_size=6),
)
_mutations = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), _parts), max_size=3)


@pytest.mark.timeout(1800)  # the full count
def test_mutated_bytes_never_break_the_server(server: LiveServer, proof_count: Callable[[int, int], int]) -> None:
    """Valid requests with pieces cut out and put in: an HTTP answer or none, and always an end."""
    statuses: dict[int, int] = {}

    @settings(max_examples=proof_count(300, 20_000), deadline=None, derandomize=True, database=None)
    @given(st.sampled_from([_GOOD, _GOOD + _GOOD, _CHUNKED, GET]), _mutations)
    def check(raw: bytes, mutations: list[tuple[float, int, bytes]]) -> None:
        for where, cut, put in mutations:
            at = int(where * len(raw))
            raw = raw[:at] + put + raw[at + cut :]
        with server.connect() as sock:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                sock.sendall(raw)
                sock.shutdown(socket.SHUT_WR)
            answer = read_all(sock)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
        status = status_of(answer)
        assert status < 500
        statuses[status] = statuses.get(status, 0) + 1

    check()
    assert statuses[400] > 20
    assert server.raw(http_post("/tokenize", {"prompt": "x"})).startswith(b"HTTP/1.1 200")


def test_malformed_chunk_in_a_body(server: LiveServer) -> None:
    head = CHUNKED_HEAD
    assert status_of(server.raw(head + b"zz\r\n{}\r\n")) == 400


def test_too_many_chunks(server: LiveServer) -> None:
    head = CHUNKED_HEAD
    with server.connect() as sock:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(head + b"1\r\nx\r\n" * 17_000)
        answer = read_all(sock)
    assert status_of(answer) in (413, 0)
    many = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 1}).encode()
    chunks = b"".join(b"1\r\n" + many[i : i + 1] + b"\r\n" for i in range(len(many)))
    closing = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert status_of(server.raw(closing + chunks + b"0\r\n\r\n")) == 200


def test_extensions_of_chunks_are_counted(server: LiveServer) -> None:
    """A million bytes of extensions around a body of a few: cut, though no chunk and no data is too many."""
    sent = 0
    with server.connect() as sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(CHUNKED_HEAD)
        while sent < (16 << 20):
            sent += sock.send(b"1;" + b"x" * 0x10000 + b"\r\n \r\n")
    assert sent < (16 << 20)
    body = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 1}).encode()
    chunk = b"%x;name=value\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    assert status_of(server.raw(CHUNKED_HEAD.replace(b"Host", b"Connection: close\r\nHost") + chunk)) == 200


def test_trailers_change_no_header(server: LiveServer) -> None:
    """A field after the body comes too late for every check of the head: it is read and thrown away."""
    body = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 1}).encode()
    chunk = b"%x\r\n" % len(body) + body + b"\r\n0\r\nX-Request-Id: late\r\nHost: evil.example\r\n\r\n"
    answer = server.raw(CHUNKED_HEAD.replace(b"Host", b"Connection: close\r\nHost") + chunk)
    assert status_of(answer) == 200
    many = b"0\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(101)) + b"\r\n"
    assert status_of(server.raw(CHUNKED_HEAD + many)) == 431
