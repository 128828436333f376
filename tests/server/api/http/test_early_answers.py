"""An answer before the end of a body: what is left is never a request, and the connection ends or is in step."""

import contextlib
import json
import re
import socket
from collections.abc import Iterator

import pytest

from guanaco.server.api.http.early_answers import SMALL_BODY_BYTES
from support.server.api_server import LiveServer, http_post, make_state, read_all

KEY = "sesame"
MAX_BODY = 100_000
GET = b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=(KEY,), max_body_bytes=MAX_BODY, body_timeout=3600)) as live:
        yield live
        live.assert_quiet()


def head_of(length: int, *, key: str = KEY, path: str = "/tokenize", **headers: str) -> bytes:
    lines = {"Authorization": f"Bearer {key}", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return http_post(path, b"x" * length, close=False, headers=lines).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def answer_to(sock: socket.socket) -> tuple[int, str, bool]:
    """Status, code, and whether the answer says that the connection ends."""
    head, _, body = b"".join(iter(lambda: sock.recv(1), b"}")).partition(b"\r\n\r\n")
    body += b"}" + sock.recv(1)  # the envelope ends with two
    code = json.loads(body)["error"]["code"]
    return int(re.match(rb"HTTP/1.1 (\d+)", head)[1]), code, b"connection: close" in head.lower()


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (head_of(MAX_BODY + 1), 413, "request_too_large"),
        (head_of(MAX_BODY, key="wrong"), 401, "invalid_api_key"),
        (head_of(MAX_BODY, path="/v1/adapters"), 401, "invalid_api_key"),
        (head_of(MAX_BODY, path="/nope"), 404, "not_found"),
        (head_of(MAX_BODY, Content_Encoding="gzip"), 415, "unsupported_encoding"),
        (head_of(10, key="wrong", Expect="100-continue"), 401, "invalid_api_key"),
        (
            head_of(10, key="wrong").replace(b"Content-Length: 10", b"Transfer-Encoding: chunked"),
            401,
            "invalid_api_key",
        ),
    ],
    ids=["413", "401", "admin", "404", "415", "100-continue", "chunks"],
)
def test_an_early_answer_ends_the_connection_and_what_follows_is_no_request(
    server: LiveServer, head: bytes, status: int, code: str
) -> None:
    """A client that sends the next request in place of the body gets no answer to it, and its bytes run nothing."""
    if b"/v1/adapters" in head:
        status, code = 403, "admin_disabled"
    open_before = server.server.server_state.total_requests
    with server.connect() as sock:
        sock.sendall(head)
        assert answer_to(sock) == (status, code, True)
        sock.sendall(GET * 3)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    server.assert_quiet()
    assert server.server.server_state.total_requests == open_before + 1


def test_the_rest_of_the_body_is_read_and_then_the_connection_ends(server: LiveServer) -> None:
    """Closed earlier, the client that still sends would get a reset and never see why. Requests behind it get none."""
    with server.connect() as sock:
        sock.sendall(head_of(4 * MAX_BODY))
        assert answer_to(sock)[0] == 413
        for _ in range(4):
            sock.sendall(b"x" * MAX_BODY)
        sock.sendall(GET)
        assert read_all(sock) == b""


def test_no_more_is_read_than_the_limit(server: LiveServer) -> None:
    head = head_of(10).replace(b"Content-Length: 10", b"Transfer-Encoding: chunked").replace(b"/tokenize", b"/nope")
    with server.connect() as sock:
        sock.sendall(head)
        assert answer_to(sock)[0] == 404
        chunk, sent = b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while sent < 64 * MAX_BODY:
                sent += sock.send(chunk)
        assert sent < 64 * MAX_BODY


def test_a_small_body_is_waited_for_and_the_connection_goes_on(server: LiveServer) -> None:
    """Clients that send head and body apart keep their connection when a request is refused."""
    with server.connect() as sock:
        for _ in range(3):
            sock.sendall(head_of(SMALL_BODY_BYTES, key="wrong"))
            assert answer_to(sock) == (401, "invalid_api_key", False)
            sock.sendall(b"x" * SMALL_BODY_BYTES)
        sock.sendall(GET)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_a_small_body_that_never_comes_gets_no_second_answer() -> None:
    with LiveServer(make_state(keys=(KEY,), body_timeout=0.2)) as server, server.connect() as sock:
        sock.sendall(head_of(10, key="wrong"))
        assert answer_to(sock)[0] == 401
        assert read_all(sock) == b""
