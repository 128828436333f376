"""What is let in before a body is read, and whose work waits for whose: token requests, bodies, connections."""

import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from guanaco.server.api.http.auth import ApiKey
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.http.intake import Intake
from guanaco.server.grammars.compiler import GrammarCompiler
from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.spec import Grammar
from support.server.api_server import BASE, PIRATE, TERSE, WAIT, LiveServer, chat_body, http_post, make_state, read_all

KEYS = ("key-one", "key-two")


def head(path: str, length: int, key: str | None = None) -> bytes:
    """A request's head alone: its body never comes."""
    auth = f"Authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n{auth}Content-Length: {length}\r\n\r\n"
    ).encode()


def read_response(sock: socket.socket) -> tuple[int, dict[str, Any]]:
    """One response with a content-length, from a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += sock.recv(1)
    length = int(received.lower().partition(b"content-length:")[2].split()[0])
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return int(received.split()[1]), json.loads(body)


class Blocked:
    """A tokenizer whose `encode` and `decode` wait, and say what they were asked for."""

    def __init__(self, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.began = threading.Semaphore(0)
        self.texts: list[str] = []
        tokenizer = server.state.tokenizer
        encode, decode = tokenizer.encode, tokenizer.decode

        def wait(label: str) -> None:
            self.texts.append(label)
            self.began.release()
            assert self.gate.wait(WAIT)

        def waiting_encode(text: str, **options: Any) -> list[int]:
            wait(text)
            return encode(text, **options)

        def waiting_decode(ids: Any, **options: Any) -> str:
            wait("decode")
            return decode(ids, **options)

        monkeypatch.setattr(tokenizer, "encode", waiting_encode, raising=False)
        monkeypatch.setattr(tokenizer, "decode", waiting_decode, raising=False)


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


def post(server: LiveServer, path: str, body: dict, key: str | None = None) -> tuple[int, dict[str, Any]]:
    with server.client(headers={"Authorization": f"Bearer {key}"} if key else None) as client:
        response = client.post(path, json=body)
    return response.status_code, response.json()


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_one_more_token_request_is_refused_before_its_body_is_read(path: str) -> None:
    with LiveServer(make_state(max_token_requests=2)) as server:
        held = [server.connect() for _ in range(2)]
        for sock in held:
            sock.sendall(head(path, 10))
        server.call(lambda: None)
        while server.call(lambda: server.state.intake.num_token_requests) < 2:
            pass
        with server.connect() as sock:
            sock.sendall(head(path, 4_000_000))  # nothing of the body is ever sent
            status, answer = read_response(sock)
        assert (status, answer["error"]["code"]) == (429, "too_many_token_requests")
        assert answer["error"]["type"] == "rate_limit_error"
        for sock in held:
            sock.close()
        server.assert_quiet()
        assert server.call(lambda: server.state.intake.num_token_requests) == 0
        assert post(server, "/tokenize", {"prompt": "x"})[0] == 200


def test_one_key_gets_at_most_half_of_the_places() -> None:
    with LiveServer(make_state(keys=KEYS, max_token_requests=4)) as server:
        held = [server.connect() for _ in range(2)]
        for sock in held:
            sock.sendall(head("/tokenize", 10, KEYS[0]))
        while server.call(lambda: server.state.intake.num_token_requests) < 2:
            pass
        assert post(server, "/tokenize", {"prompt": "x"}, KEYS[0])[0] == 429
        assert post(server, "/tokenize", {"prompt": "x"}, KEYS[1])[0] == 200
        for sock in held:
            sock.close()


def test_chats_are_prepared_while_every_token_thread_is_blocked(
    monkeypatch: pytest.MonkeyPatch, background: Callable[..., Future[Any]]
) -> None:
    with LiveServer(make_state(max_token_requests=8)) as server:
        blocked = Blocked(server, monkeypatch)
        token_requests = [background(post, server, "/tokenize", {"prompt": "x"}) for _ in range(4)]
        token_requests += [background(post, server, "/detokenize", {"tokens": [1]}) for _ in range(4)]
        assert blocked.began.acquire(timeout=WAIT)
        while server.call(lambda: server.state.intake.num_token_requests) < 8:
            pass
        assert post(server, "/v1/chat/completions", chat_body("hello", max_tokens=1))[0] == 200
        blocked.gate.set()
        assert [request.result(WAIT)[0] for request in token_requests] == [200] * 8


def test_token_requests_are_answered_while_every_preparation_thread_is_blocked(
    monkeypatch: pytest.MonkeyPatch, background: Callable[..., Future[Any]]
) -> None:
    with LiveServer(make_state()) as server:
        blocked = Blocked(server, monkeypatch)
        body = {"model": BASE, "prompt": "hello", "max_tokens": 1}
        requests = [background(post, server, "/v1/completions", body) for _ in range(3)]
        for _ in range(2):
            assert blocked.began.acquire(timeout=WAIT)
        chat = {"messages": [{"role": "user", "content": "x"}]}  # through `encode_chat`, which doesn't wait
        assert post(server, "/tokenize", chat)[0] == 200
        blocked.gate.set()
        assert [request.result(WAIT)[0] for request in requests] == [200] * 3


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
def test_a_flood_for_one_adapter_waits_behind_the_first_of_another(
    path: str, monkeypatch: pytest.MonkeyPatch, background: Callable[..., Future[Any]]
) -> None:
    """All come before the first thread is free: then adapters take turns. Made-up names are one queue together."""
    with LiveServer(make_state(max_token_requests=32)) as server:
        blocked = Blocked(server, monkeypatch)
        pool = server.state.token_work if path == "/tokenize" else server.state.preparation
        num_threads = pool._num_idle
        requests = []

        def waits() -> int:
            return sum(len(turns) for t in pool._waiting.values() for turns in t.topics.values())

        def ask(model: str, text: str) -> None:
            body = {"model": model, "prompt": text} | ({"max_tokens": 1} if path != "/tokenize" else {})
            before = server.call(waits)
            requests.append(background(post, server, path, body))
            if len(requests) > num_threads:
                while server.call(waits) == before:
                    pass
            else:
                assert blocked.began.acquire(timeout=WAIT)

        for i in range(num_threads):
            ask(PIRATE, f"busy {i}")
        for i in range(4):
            ask(PIRATE, f"flood {i}")
        for i in range(3):
            ask(f"made-up-{i}", "never tokenised")
        ask(TERSE, "other")
        blocked.gate.set()
        statuses = [request.result(WAIT)[0] for request in requests]
        assert statuses.count(404) == 3
        assert statuses.count(200) == num_threads + 5
        assert blocked.texts.index("other") < blocked.texts.index("flood 2"), blocked.texts


def code_of(function: Callable[..., object], *args: object) -> str | None:
    try:
        function(*args)
    except ApiError as error:
        return error.code
    return None


def test_bodies_never_hold_more_than_the_memory_for_them() -> None:
    intake = Intake(max_token_requests=1, max_body_memory=8 << 20, has_keys=False)
    large = [intake.body(None) for _ in range(4)]
    for held in large:
        for _ in range(32):
            code_of(held.add, 64 << 10)
            assert intake.num_body_bytes <= 8 << 20
    assert intake.num_body_bytes == 7 << 20, "the last eighth is for small bodies"
    with intake.body(None) as small:
        assert code_of(small.expect, 1000) is None
        assert code_of(small.add, 1000) is None
        assert code_of(small.add, 64 << 10) == "server_overloaded"
    assert code_of(intake.body(None).expect, 4 << 20) == "server_overloaded"
    for held in large:
        held.__exit__(None, None, None)
    assert intake.num_body_bytes == 0


def test_bodies_of_one_key_leave_the_other_half() -> None:
    intake = Intake(max_token_requests=1, max_body_memory=8 << 20, has_keys=True)
    one, two = ApiKey("one", b""), ApiKey("two", b"")
    with intake.body(one) as first, intake.body(two) as second:
        assert code_of(first.add, 4 << 20) is None
        assert code_of(first.add, 1) == "too_many_body_bytes"
        assert code_of(second.add, 1 << 20) is None
    assert not intake._body_bytes


def test_a_body_without_room_is_refused_before_it_is_read() -> None:
    with LiveServer(make_state(max_body_bytes=1 << 20, max_body_memory=2 << 20)) as server:
        part = b'{"model": "' + b"x" * 900_000
        held = [server.connect() for _ in range(2)]
        for sock in held:
            sock.sendall(head("/v1/chat/completions", 1 << 20))
        while server.call(lambda: server.state.lifecycle.num_open) < 2:
            pass  # a body that is announced when another one is there already would be refused at once
        for sock in held:
            sock.sendall(part)
        while server.call(lambda: server.state.intake.num_body_bytes) < 2 * len(part):
            assert server.state.intake.num_body_bytes <= 2 << 20
            if server.call(lambda: server.state.intake.num_body_bytes) > (2 << 20) * 7 // 8 - (64 << 10):
                break
        with server.connect() as sock:
            sock.sendall(head("/v1/completions", 1 << 20))
            status, answer = read_response(sock)
        assert (status, answer["error"]["code"]) == (503, "server_overloaded")
        assert post(server, "/v1/chat/completions", chat_body("small", max_tokens=1))[0] == 200
        for sock in held:
            sock.close()
        server.assert_quiet()
        assert server.call(lambda: server.state.intake.num_body_bytes) == 0


def few_connections(most: int, spare: int) -> LiveServer:
    live = LiveServer(make_state())
    protocol = live.server.config.http
    protocol.limits = dataclasses.replace(protocol.limits, max_connections=most, max_spare_connections=spare)
    return live


def test_connections_beyond_the_most_are_refused_but_for_health() -> None:
    with few_connections(2, 8) as server:
        held = [server.connect() for _ in range(2)]
        while server.call(lambda: len(server.server.server_state.connections)) < 2:
            pass
        refused = server.raw(http_post("/v1/chat/completions", chat_body("x")))
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"too_many_connections" in refused
        assert b"Retry-After: 1\r\n" in refused
        healthy = server.raw(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")  # closed by the server
        assert healthy.startswith(b"HTTP/1.1 200 ")
        held[0].close()
        while server.call(lambda: len(server.server.server_state.connections)) > 1:
            pass
        assert server.raw(http_post("/v1/chat/completions", chat_body("x", max_tokens=1))).startswith(b"HTTP/1.1 200 ")
        held[1].close()


def test_connections_beyond_the_spare_ones_are_cut() -> None:
    with few_connections(1, 1) as server:
        held = [server.connect() for _ in range(2)]
        while server.call(lambda: len(server.server.server_state.connections)) < 2:
            pass
        with server.connect() as sock:
            assert read_all(sock) == b""
        for sock in held:
            sock.close()


def test_connection_limit_comes_from_the_settings() -> None:
    with LiveServer(make_state(max_connections=7)) as server:
        assert server.server.config.http_protocol_class.limits.max_connections == 7


def test_one_keys_flood_of_grammars_delays_another_by_one_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled one at a time, the keys in turn, and a key has only so many in the queue: more get 429 at once,
    and take no place that another key's request needs."""
    go, order = threading.Semaphore(0), []

    def compile_slowly(_: object, grammar: Grammar) -> None:
        order.append(grammar.text)
        go.acquire()
        raise GrammarError("it is hostile")

    monkeypatch.setattr(GrammarCompiler, "compile", compile_slowly)

    def post(client: httpx.Client, key: str, pattern: str) -> tuple[int, str]:
        body = chat_body("x", structured_outputs={"regex": pattern})
        answer = client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        return answer.status_code, answer.json()["error"]["code"]

    def waiting() -> int:
        return sum(server.state.intake._grammars.values())

    with LiveServer(make_state(keys=KEYS, max_queued_grammars=4)) as server, server.client() as client:
        with ThreadPoolExecutor(8) as pool:
            flood = []
            for number in range(4):
                flood.append(pool.submit(post, client, KEYS[0], f"a{number}"))
                while server.call(waiting) <= number:
                    pass
            assert post(client, KEYS[0], "a4") == (429, "too_many_grammars")
            other = pool.submit(post, client, KEYS[1], "b")
            while server.call(waiting) < 5:
                pass
            go.release(5)
            assert other.result(WAIT) == (400, "invalid_grammar")
            assert {future.result(WAIT) for future in flood} == {(400, "invalid_grammar")}
        assert order.index("b") == 2, "behind the one that runs and the one whose turn had come"
        assert server.call(waiting) == 0
        server.assert_quiet()
