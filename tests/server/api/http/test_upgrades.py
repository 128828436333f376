"""A request that offers another protocol is answered as HTTP/1.1, body and all, however its bytes arrive."""

import json
import re
from collections.abc import Iterator

import pytest

from support.server.api_server import LiveServer, http_post, make_state

BODY = b'{"prompt": "\\r\\nUpgrade: h2c\\r\\n\\r\\n"}'
OFFER = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA",
}
POST = http_post("/tokenize", BODY, close=False, headers=OFFER)
CHUNKED = (
    POST.partition(b"\r\n\r\n")[0].replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")
    + b"\r\n\r\n5\r\n"
    + BODY[:5]
    + b"\r\n%x\r\n" % (len(BODY) - 5)
    + BODY[5:]
    + b"\r\n0\r\n\r\n"
)
PLAIN = http_post("/tokenize", {"prompt": "x"}, close=False)
LAST = http_post("/tokenize", {"prompt": "last"})


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live
        live.assert_quiet()


def counts_of(answer: bytes) -> list[int]:
    """The number of tokens in each answer; the fake tokenizer makes one of each character."""
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"] * answer.count(b"HTTP/1.1 ")
    return [json.loads(body)["count"] for body in re.findall(rb'\{"count".*?\}', answer)]


def test_offers_are_ignored_on_a_connection_that_goes_on(server: LiveServer) -> None:
    """Java's client sends one with each request. What looks like a header within a body stays there."""
    size = len(json.loads(BODY)["prompt"])
    for protocol in (b"h2c", b"websocket", b"foo/2, bar", b""):
        requests = (POST + CHUNKED + PLAIN + POST + POST).replace(
            b"Upgrade: h2c\r\nHTTP2", b"Upgrade: %s\r\nHTTP2" % protocol
        )
        expected = [count + 1 for count in (size, size, 1, size, size, 4)]  # with BOS
        assert counts_of(server.raw(requests + LAST)) == expected, protocol


@pytest.mark.parametrize("spelling", [b"UPGRADE:h2c", b"upgrade:  h2c ", b"Upgrade: h2c\r\nUpgrade: websocket"])
def test_spellings_of_the_offer(server: LiveServer, spelling: bytes) -> None:
    assert len(counts_of(server.raw(POST.replace(b"Upgrade: h2c", spelling, 1) + LAST))) == 2


def test_a_request_without_a_body_is_answered_once(server: LiveServer) -> None:
    get = b"GET /version HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert server.raw(get + get + LAST).count(b"HTTP/1.1 200") == 3
    assert server.raw(get.replace(b"Connection: Upgrade", b"Connection: Upgrade, close")).count(b"HTTP/1.1 200") == 1


@pytest.fixture(params=[1, 2, 3, 7])
def splitting(server: LiveServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LiveServer:
    """A server whose connections get their bytes in pieces of so many."""
    protocol, size = server.server.config.http_protocol_class, request.param
    whole = protocol.data_received

    def in_pieces(self: object, data: bytes) -> None:
        for start in range(0, len(data), size):
            whole(self, data[start : start + size])

    monkeypatch.setattr(protocol, "data_received", in_pieces)
    return server


@pytest.mark.parametrize("request_bytes", [POST, CHUNKED], ids=["length", "chunks"])
def test_split_at_every_byte(splitting: LiveServer, request_bytes: bytes) -> None:
    assert len(counts_of(splitting.raw(request_bytes + PLAIN + request_bytes + LAST))) == 4


def test_split_in_two_at_every_byte(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection for each place where two packets may meet."""
    protocol = server.server.config.http_protocol_class
    whole = protocol.data_received
    for cut in range(1, len(POST)):

        def in_two(self: object, data: bytes, cut: int = cut) -> None:
            whole(self, data[:cut])
            whole(self, data[cut:])

        monkeypatch.setattr(protocol, "data_received", in_two)
        assert len(counts_of(server.raw(POST + LAST))) == 2, cut


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Content-Length", b"Content-Length: 5\r\nContent-Length"),
        (b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length"),
        (b"Upgrade: h2c", b"Upgrade: h2c\r\n Content-Length: 0"),
        (b"Upgrade: h2c", b"Upgrade : h2c"),
        (b"Upgrade: h2c", b"Upgrade: h2c\nContent-Length: 0"),
        (b"Upgrade: h2c", b"Upgrade: h2c\x00"),
        (b"Upgrade: h2c", b"Upgrade: h2c\rX: y"),
        (b"Upgrade: h2c", b"Upgrade: h2c\r\nTransfer-Encoding: gzip, chunked"),
        (b"Upgrade: h2c", b"Upgrade: h2c\r\nHost: other"),
        (b"HTTP/1.1", b"HTTP/2.0"),
        (b"POST /tokenize", b"CONNECT /tokenize"),
        (b"POST /tokenize", b"CONNECT t:80"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_beside_an_offer(server: LiveServer, old: bytes, new: bytes) -> None:
    for request in (POST, http_post("/tokenize", BODY, close=False, headers={"Upgrade": "h2c"})):
        answer = server.raw(request.replace(old, new, 1) + LAST)
        assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"400"]


def test_limits_of_the_head_hold_beside_an_offer(server: LiveServer) -> None:
    head, _, _ = POST.partition(b"\r\n\r\n")
    many = b"".join(b"X%d: y\r\n" % i for i in range(100))
    for request in (head + b"\r\n" + many + b"\r\n", head + b"\r\nX: " + b"x" * (32 << 10) + b"\r\n\r\n"):
        assert server.raw(request).startswith(b"HTTP/1.1 431")
