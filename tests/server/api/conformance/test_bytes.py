"""Bodies that are no JSON, no UTF-8, too deep, too large or of another type: the client's error, never ours."""

import json
from typing import Any

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, LiveServer, http_post, make_state

CHAT, COMPLETIONS, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"
CONTENT: dict[str, tuple[str, Any]] = {
    CHAT: ("messages", [{"role": "user", "content": "hi"}]),
    COMPLETIONS: ("prompt", "hi"),
    RESPONSES: ("input", "hi"),
    TOKENIZE: ("prompt", "hi"),
}


def body_of(route: str, more: bytes = b"") -> bytes:
    name, value = CONTENT[route]
    return json.dumps({"model": BASE, name: value}).encode()[:-1] + more + b"}"


# name → what stands behind the good fields of a body
BAD_MEMBERS: dict[str, bytes] = {
    "NaN": b', "temperature": NaN',
    "Infinity": b', "temperature": Infinity',
    "minus Infinity": b', "x": -Infinity',
    "1e400": b', "temperature": 1e400',
    "-1e400 in a field on no list": b', "x": -1e400',
    "a lone surrogate": b', "user": "\\ud800"',
    "a lone low surrogate": b', "user": "\\udfff"',
    "a lone surrogate as a key": b', "\\ud800": 1',
    "bytes that are no UTF-8": b', "user": "\xff"',
    "an overlong slash": b', "user": "\xc0\xaf"',
    "a surrogate in UTF-8": b', "user": "\xed\xa0\x80"',
    "the model twice": b', "model": "pirate"',
    "a key twice, deep inside": b', "x": [{"a": 1, "a": 2}]',
    "a key twice, once escaped": b', "user": "a", "\\u0075ser": "b"',
    "a control character in a text": b', "user": "a\nb"',
    "a comma too many": b",",
    "single quotes": b", 'user': 'x'",
    "a comment": b" /* no */",
    "a leading zero": b', "seed": 01',
    "a plus sign": b', "seed": +1',
    "a hexadecimal number": b', "seed": 0x10',
    "a bare word": b', "stream": True',
    "undefined": b', "stream": undefined',
    "deep lists": b', "x": ' + b"[" * 5_000 + b"]" * 5_000,
    "deep objects": b', "x": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "too many lists": b', "x": [' + b"[]," * 100_000 + b"[]]",
    "a text that never ends": b', "user": "x',
}
BAD_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "white space": b"  \n ",
    "a list": b"[]",
    "a text": b'"hi"',
    "a number": b"5",
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf" + body_of(CHAT),
    "UTF-16": body_of(CHAT).decode().encode("utf-16"),
    "UTF-32": body_of(CHAT).decode().encode("utf-32"),
    "two bodies": body_of(CHAT) + body_of(CHAT),
    "a zero byte behind": body_of(CHAT) + b"\0",
    "half a body": body_of(CHAT)[:20],
    "a form": b"model=x&prompt=y",
}


def refused(http: httpx.Client, route: str, body: bytes) -> dict[str, Any]:
    answer = http.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    return shapes.error(answer.json())


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, RESPONSES, TOKENIZE])
@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_member(http: httpx.Client, name: str, route: str) -> None:
    assert refused(http, route, body_of(route, BAD_MEMBERS[name]))["code"] == "invalid_json"


@pytest.mark.parametrize("name", BAD_BODIES)
def test_body(http: httpx.Client, name: str) -> None:
    assert refused(http, CHAT, BAD_BODIES[name])["code"] == "invalid_json"


# Numbers are what they look like: no truth values, no texts, no fractions, and nothing too large to hold.
NUMBERS: list[tuple[str, bytes]] = [
    *(("max_tokens", value) for value in (b"true", b"1.0", b"1.5", b'"1"', b"1e2", b"-0", b"1" + b"0" * 30, b"[]")),
    *(("seed", value) for value in (b"true", b"1.5", b'"1"', b"9" * 400, b"-" + b"9" * 30, b"{}")),
    *(("temperature", value) for value in (b"true", b'"1"', b"1e308", b"9" * 400, b"[1]")),
    *(("n", value) for value in (b"false", b"1.0", b'"1"', b"9" * 30)),
    *(("logit_bias", value) for value in (b'{"1": true}', b'{"1": "1"}', b'{"1": 1e308}', b'{"1": null}')),
    *(("stream", value) for value in (b"1", b"0", b'"true"', b"[]")),
]


@pytest.mark.parametrize(
    ("field", "value"), NUMBERS, ids=[f"{field} {value[:12].decode()}" for field, value in NUMBERS]
)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_number(http: httpx.Client, route: str, field: str, value: bytes) -> None:
    error = refused(http, route, body_of(route, b', "%s": %s' % (field.encode(), value)))
    assert error["param"] == field
    assert error["code"] in ("invalid_type", "invalid_value")


TYPES: dict[str, tuple[dict[str, str], int]] = {
    "no type": ({"Content-Type": ""}, 415),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "plain text": ({"Content-Type": "text/plain"}, 415),
    "a multipart form": ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
    "Latin-1": ({"Content-Type": "application/json; charset=latin-1"}, 415),
    "gzip": ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    "UTF-8 by name": ({"Content-Type": "application/json; charset=utf-8"}, 200),
    "capitals": ({"Content-Type": "Application/JSON"}, 200),
    "identity": ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
}


@pytest.mark.parametrize("name", TYPES)
def test_content_type(http: httpx.Client, name: str) -> None:
    headers, status = TYPES[name]
    answer = http.post(CHAT, content=body_of(CHAT, b', "max_tokens": 2'), headers=headers)
    assert answer.status_code == status, answer.text
    if status == 200:
        shapes.chat(answer.json())
    else:
        assert shapes.error(answer.json())["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def small() -> Any:
    with LiveServer(make_state(max_body_bytes=1024)) as live:
        yield live


def envelope(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head.lower()
    return int(head.split()[1]), shapes.error(json.loads(body))


def test_a_body_that_is_too_large(small: LiveServer) -> None:
    status, error = envelope(small.raw(http_post(CHAT, {"model": BASE, "x": "y" * 2000})))
    assert (status, error["type"], error["code"]) == (413, "invalid_request_error", "request_too_large")


def test_a_body_that_grows_too_large(small: LiveServer) -> None:
    pieces = b"".join(b"200\r\n%s\r\n" % (b" " * 0x200) for _ in range(4)) + b"0\r\n\r\n"
    lines = ("Host: test", "Content-Type: application/json", "Transfer-Encoding: chunked", "Connection: close")
    head = "\r\n".join((f"POST {CHAT} HTTP/1.1", *lines, "", "")).encode()
    status, error = envelope(small.raw(head + pieces))
    assert (status, error["code"]) == (413, "request_too_large")


def test_a_head_that_is_too_large(small: LiveServer) -> None:
    status, error = envelope(small.raw(http_post(CHAT, {}, headers={"X-Long": "x" * 200_000})))
    assert (status, error["type"]) == (431, "invalid_request_error")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/chat/completions\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bytes_that_are_no_http(small: LiveServer, head: bytes) -> None:
    status, _ = envelope(small.raw(head))
    assert status == 400
