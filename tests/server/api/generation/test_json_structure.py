"""Bodies with too much structure are refused before they are parsed; text is text, whatever signs it has."""

import json
import threading
from typing import Any

import pytest

from guanaco.server.api.generation import body as body_module
from guanaco.server.api.generation import json_structure
from guanaco.server.api.generation.body import parse_object
from guanaco.server.api.generation.json_structure import MAX_BRACKETS, MAX_DIGITS, MAX_ITEMS, MAX_KEYS, check_structure
from guanaco.server.api.http.errors import ApiError
from support.server.api_server import BASE, LiveServer, chat_body, make_state


def refusal(body: bytes) -> str | None:
    try:
        check_structure(body)
    except ApiError as error:
        return error.message
    return None


def keys(count: int) -> bytes:
    return json.dumps({f"k{i}": 1 for i in range(count)}).encode()


@pytest.mark.parametrize(
    ("fits", "too_much", "word"),
    [
        (keys(MAX_KEYS), keys(MAX_KEYS + 1), "keys"),
        (b"[1" + b",1" * MAX_ITEMS + b"]", b"[1" + b",1" * (MAX_ITEMS + 1) + b"]", "items"),
        (b"[" + b"[]," * (MAX_BRACKETS - 2) + b"[]]", b"[" + b"[]," * MAX_BRACKETS + b"[]]", "lists and objects"),
        (b"[" + b"7" * MAX_DIGITS + b"]", b"[1," + b"7" * (MAX_DIGITS + 1) + b"]", "digits"),
        (b"[]", b'""' * 1_000_000 + b'"' + b"," * (MAX_ITEMS + 1) + b'"', "items"),
    ],
    ids=["keys", "items", "brackets", "digits", "strings"],
)
def test_limits(fits: bytes, too_much: bytes, word: str) -> None:
    assert refusal(fits) is None
    assert word in (refusal(too_much) or "")


@pytest.mark.parametrize("sign", [",", ":", "[", "{", "7", '\\"', '\\",', "\\\\", '\\"7,{'])
def test_signs_in_a_text_are_text(sign: str) -> None:
    text = sign * (MAX_ITEMS + 10)
    assert refusal(b'{"prompt":"' + text.encode() + b'"}') is None
    assert refusal(b'{"prompt":"' + text.encode()) is None, "the parser says that it has no end"
    assert refusal(b'{"prompt":"' + text.encode() + b"\\") is None


def test_what_follows_a_text_is_counted() -> None:
    text = b'{"a":"' + b",\\\\" * 3 + b'","b":[' + b"1," * (MAX_ITEMS + 1) + b"1]}"
    assert "items" in (refusal(text) or "")


BAD = {
    "keys": {"logit_bias": {str(i): 1 for i in range(300_000)}},
    "integers": {"prompt": [1] * 1_900_000},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 99_000}]},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_such_bodies_are_never_parsed(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(body_module, "from_json", never)
    with pytest.raises(ApiError) as caught:
        parse_object(json.dumps(chat_body() | fields, separators=(",", ":")).encode())
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_large_bodies_are_looked_at_off_the_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def seen(body: bytes) -> None:
        threads.append(threading.current_thread())
        check_structure(body)

    monkeypatch.setattr(body_module, "check_structure", seen)
    with LiveServer(make_state()) as server, server.client() as client:
        loop_thread = server.call(threading.current_thread)
        response = client.post(path, json={"model": BASE, "unknown": "x" * 20_000})
        assert response.status_code == 400
        assert threads, "nobody looked"
        assert loop_thread not in threads


def test_small_numbers_and_duplicate_keys_are_still_seen() -> None:
    assert parse_object(b'{"a":[1,-2,3.5]}') == {"a": [1, -2, 3.5]}
    with pytest.raises(ApiError):
        parse_object(b'{"a":{"b":1,"b":2}}')


class Watched:
    """A compiled expression that notes how much it was given in one call."""

    def __init__(self, pattern: Any) -> None:
        self.pattern = pattern
        self.longest = 0

    def match(self, body: bytes, start: int, end: int) -> Any:
        self.longest = max(self.longest, end - start)
        return self.pattern.match(body, start, end)

    def search(self, body: bytes, start: int, end: int) -> Any:
        self.longest = max(self.longest, end - start)
        return self.pattern.search(body, start, end)


@pytest.mark.parametrize("inside", [b'\\",', b"x,", b"\\\\,", b"7,"])
def test_no_call_looks_at_more_than_a_piece(inside: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's lock is held for all of a call: one over a text of megabytes stopped every stream."""
    watched = Watched(json_structure._INSIDE), Watched(json_structure._LONG_NUMBER)
    monkeypatch.setattr(json_structure, "_INSIDE", watched[0])
    monkeypatch.setattr(json_structure, "_LONG_NUMBER", watched[1])
    check_structure(b'{"prompt":"' + inside * 400_000 + b'"}')
    check_structure(b'{"prompt":"' + b"x7" * 400_000 + b'"}')
    assert 0 < watched[0].longest <= json_structure.PIECE_BYTES
    assert 0 < watched[1].longest <= json_structure.PIECE_BYTES + MAX_DIGITS


@pytest.mark.parametrize("size", [2, 3, 5])
def test_strings_and_numbers_lie_across_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_structure, "PIECE_BYTES", size)
    monkeypatch.setattr(json_structure, "MAX_ITEMS", 3)
    for text in ("", ",", "\\", '"', ',"', '\\",', "a,,,,b\\\\", '"",,,,""'):
        body = json.dumps([text] * 4).encode()
        assert refusal(body) is None, text
        assert "items" in (refusal(body[:-1] + b",1]") or ""), text
    for end in (b'"', b'"\\', b'",,,,', b'",,,,\\\\\\'):
        assert refusal(b"[1" + end) is None
    assert "digits" in (refusal(b"[" + b"7" * (MAX_DIGITS + 1) + b"]") or "")
    assert refusal(b"[" + b"7" * MAX_DIGITS + b',"' + b"7" * MAX_DIGITS + b'"]') is None
