"""Event streams as bytes on the wire: separators, the end, failures in the middle, comments."""

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from guanaco.server.api.generation import sse
from support.server.api_server import BASE, WAIT, LiveServer, chat_body, http_post, make_state, read_all, sse_data
from support.server.fake_engine import reply_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES = {
    CHAT: chat_body("hello", stream=True),
    COMPLETIONS: {"model": BASE, "prompt": "hello", "stream": True, "max_tokens": 1000},
}
both_routes = pytest.mark.parametrize("route", [CHAT, COMPLETIONS])


def dechunk(raw: bytes) -> tuple[bytes, bytes]:
    """(head, body) of an HTTP/1.1 response in chunks, complete to the terminating chunk."""
    head, writes = writes_of(raw)
    return head, b"".join(writes)


def writes_of(raw: bytes) -> tuple[bytes, list[bytes]]:
    """The head of an HTTP/1.1 response in chunks, and each chunk: uvicorn makes one of each body that it is sent."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    writes = []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            assert rest == b"\r\n"
            return head, writes
        writes.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]


@both_routes
def test_bytes_on_the_wire(server: LiveServer, route: str) -> None:
    head, body = dechunk(server.raw(http_post(route, {**BODIES[route], "max_tokens": 30})))
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/event-stream" in head
    assert b"cache-control: no-store" in head
    assert b"\r" not in body, "events are separated by LF alone"
    assert body.endswith(b"\n\ndata: [DONE]\n\n")
    events = body.split(b"\n\n")[:-1]
    assert len(events) == 31
    for event in events:
        assert event.startswith(b"data: ")
        assert b"\n" not in event
    assert body.count(b"[DONE]") == 1


def test_the_last_step_is_one_write(server: LiveServer) -> None:
    """The last token, the usage and [DONE] leave together; earlier tokens leave when they are made."""
    server.script(step_seconds=0.002)
    fields = {"max_tokens": 5, "stream_options": {"include_usage": True}}
    _, writes = writes_of(server.raw(http_post(CHAT, {**BODIES[CHAT], **fields})))
    assert [write.count(b"data: ") for write in writes] == [1, 1, 1, 1, 3]


def test_no_event_gets_a_cancel_scope_of_its_own(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would make one around each write, though no stream has a time-out for it."""
    made = []
    original = anyio.move_on_after

    def seen(*arguments: Any, **options: Any) -> Any:
        made.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(anyio, "move_on_after", seen)
    with server.client() as client:
        assert len(sse_data(client.post(CHAT, json={**BODIES[CHAT], "max_tokens": 50}).content)) == 51
    assert len(made) < 5


def test_all_choices_of_a_step_are_one_write(server: LiveServer) -> None:
    """What has arrived when a step's outputs are read leaves in one write, whichever choice it belongs to."""
    fields = {"max_tokens": 4, "n": 3}
    gate = server.gate()
    with server.connect() as sock:
        sock.sendall(http_post(CHAT, {**BODIES[CHAT], **fields}))
        server.until(lambda engine: len(engine.running) == 3)
        server.open(gate)
        _, writes = writes_of(read_all(sock))
    assert sum(write.count(b"data: ") for write in writes) == 13
    assert len(writes) <= 5, "3 choices of 4 steps were written one by one"


def test_large_last_events_leave_one_by_one_and_others_get_their_turn() -> None:
    """The log-probabilities of a long answer are megabytes; nothing else may wait until all of them are encoded."""
    large, made, turns = bytes(sse._LARGE_PIECE_BYTES + 1), [], []

    class Ends:
        async def __aiter__(self) -> AsyncIterator[Any]:
            return
            yield

    def pieces() -> Iterator[bytes]:
        for piece in (b"small", large, large, b"end"):
            made.append(len(made))
            yield piece

    async def run() -> list[bytes]:
        async def other_stream() -> None:
            while True:
                turns.append(len(made))
                await asyncio.sleep(0)

        other = asyncio.create_task(other_stream())
        answer = SimpleNamespace(first_events=bytes, last_events=pieces, generation=Ends())
        written = [one async for one in sse._events(answer, SimpleNamespace(outcome=None), None)]  # type: ignore[arg-type]
        other.cancel()
        return written

    assert asyncio.run(run()) == [b"small" + large, large, b"end"]
    assert turns == [2, 3], "after each large piece, before the next one is made"


class BenchParser:
    """How `vllm bench serve` reads: a text buffer, messages between blank lines, each chunk with choices is a token."""

    def __init__(self) -> None:
        self.buffer = ""
        self.num_tokens = 0
        self.text = ""
        self.output_tokens = 0
        self.done = False

    def feed(self, data: bytes) -> None:
        self.buffer += data.decode()
        while "\n\n" in self.buffer:
            message, self.buffer = self.buffer.split("\n\n", 1)
            message = message.strip()
            if not message or message.startswith(":"):
                continue
            message = message.removeprefix("data: ")
            if message == "[DONE]":
                self.done = True
                continue
            data = json.loads(message)
            if choices := data.get("choices"):
                self.num_tokens += 1
                self.text += choices[0]["delta"].get("content") or ""
            elif usage := data.get("usage"):
                self.output_tokens = usage["completion_tokens"]


def _feed_all(parser: BenchParser, body: bytes, size: int) -> BenchParser:
    """In pieces of `size` bytes that don't cut characters (the client decodes each piece by itself)."""
    at = 0
    while at < len(body):
        end = min(len(body), at + size)
        while end < len(body) and body[end] & 0xC0 == 0x80:
            end += 1
        parser.feed(body[at:end])
        at = end
    return parser


@pytest.mark.parametrize("size", [1, 7, 100, 100_000])
def test_vllm_bench_reads_every_token(server: LiveServer, size: int) -> None:
    fields = {"max_tokens": 50, "stream_options": {"include_usage": True}}
    body = {**BODIES[CHAT], **fields, "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    _, raw = dechunk(server.raw(http_post(CHAT, body)))
    parser = _feed_all(BenchParser(), raw, size)
    assert parser.text == reply_of(server.engine.requests[-1])[:50]
    assert (parser.num_tokens, parser.output_tokens, parser.done) == (50, 50, True)


def test_the_bench_parser_would_notice_crlf(server: LiveServer) -> None:
    """The check of the check: the same stream with the other line ends that SSE allows is unreadable."""
    _, raw = dechunk(server.raw(http_post(CHAT, {**BODIES[CHAT], "max_tokens": 5})))
    parser = BenchParser()
    parser.feed(raw.replace(b"\n", b"\r\n"))
    assert parser.num_tokens == 0


@both_routes
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ("queue_timeout", 503, "queue_timeout"),
        ("numerical_error", 500, "numerical_error"),
        ("server_shutting_down", 503, "server_shutting_down"),
        ("engine_dead", 500, "engine_unavailable"),
        ("something else: SECRET", 500, "internal_error"),
    ],
)
def test_failure_before_the_first_output_is_plain_json(
    server: LiveServer, route: str, failure: str, status: int, code: str
) -> None:
    server.script(fail_after=0, failure=failure)
    with server.client() as client:
        for streaming in (True, False):
            response = client.post(route, json={**BODIES[route], "stream": streaming})
            assert response.status_code == status
            assert response.headers["content-type"] == "application/json"
            assert response.json()["error"]["code"] == code
            assert "SECRET" not in response.text
            assert ("retry-after" in response.headers) == (code == "queue_timeout")


@both_routes
def test_failure_in_the_middle_is_an_error_event_without_done(server: LiveServer, route: str) -> None:
    server.script(fail_after=4, failure="numerical_error")
    with server.client() as client:
        response = client.post(route, json=BODIES[route])
        whole = client.post(route, json={**BODIES[route], "stream": False})
    assert response.status_code == 200
    *chunks, error = sse_data(response.content)
    assert len(chunks) == 4
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["code"] == "numerical_error"
    assert whole.status_code == 500
    assert whole.json() == error


def test_one_failed_choice_fails_the_request_and_ends_the_others(server: LiveServer) -> None:
    before = len(server.engine.aborted)
    gate = server.gate()
    with server.connect() as sock:
        sock.sendall(http_post(CHAT, {**BODIES[CHAT], "n": 3}))
        server.until(lambda engine: len(engine.running) == 3)
        server.call(lambda: list(server.engine.running.values())[1].end_with("numerical_error"))
        head, body = read_all(sock).split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 500")
    assert json.loads(body)["error"]["code"] == "numerical_error"
    assert len(server.engine.aborted) == before + 2
    server.open(gate)


def test_a_bug_of_ours_in_the_middle(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw ends the stream with an event that says nothing of it, and its generation."""
    numbers = itertools.count()

    def token_bytes(token_id: int) -> bytes:
        if next(numbers) == 3:
            raise RuntimeError("SECRET")
        return b"x"

    monkeypatch.setattr(server.state.tokenizer, "token_bytes", token_bytes)
    aborted = len(server.engine.aborted)
    server.script(step_seconds=0.01)
    with server.client() as client:
        body = {**BODIES[CHAT], "logprobs": True, "max_tokens": 30}
        response = client.post(CHAT, json=body)
        events = sse_data(response.content)
        assert [event.get("error", {}).get("code") for event in events] == [None, None, None, "internal_error"]
        assert "SECRET" not in response.text
    server.assert_quiet()
    assert len(server.engine.aborted) == aborted + 1


def test_engine_that_dies_in_the_middle() -> None:
    """Every open request gets its error: JSON where nothing was sent yet, an event where something was."""
    with LiveServer(make_state()) as server:
        server.script(step_seconds=0.01)
        streams, wholes = [server.connect() for _ in range(5)], [server.connect() for _ in range(5)]
        for sock in streams:
            sock.sendall(http_post(CHAT, BODIES[CHAT]))
        for sock in wholes:
            sock.sendall(http_post(CHAT, chat_body("hello")))
        server.until(lambda engine: len(engine.running) == 10)
        first = [sock.recv(65536) for sock in streams]
        server.call(server.engine.die)
        for start, sock in zip(first, streams, strict=True):
            received = start + read_all(sock)
            assert b"[DONE]" not in received
            assert b'"code":"engine_unavailable"' in received
        for sock in wholes:
            assert read_all(sock).startswith(b"HTTP/1.1 500")
        server.join()
        assert server.server.exit_code == 70


def test_request_timeout() -> None:
    with LiveServer(make_state(request_timeout=0.3)) as server:
        server.gate()
        with server.client() as client:
            response = client.post(CHAT, json=chat_body())
            assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
            server.script(step_seconds=0.05)
            events = sse_data(client.post(CHAT, json=BODIES[CHAT]).content)
            assert events[-1]["error"]["code"] == "request_timeout"
            assert len(events) > 1
            assert "[DONE]" not in events
        server.assert_quiet()


def test_pings_while_nothing_comes(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the stream begins without an output, and comments keep it open; LF there too."""
    monkeypatch.setattr(sse, "PING_SECONDS", 0.03)
    monkeypatch.setattr(sse, "FIRST_OUTPUT_PATIENCE_SECONDS", 0.03)
    gate = server.gate()
    with server.connect() as sock:
        sock.sendall(http_post(CHAT, {**BODIES[CHAT], "max_tokens": 3}))
        received = b""
        while received.count(b": ping\n\n") < 2:
            received += sock.recv(65536)
        assert b"data:" not in received
        server.open(gate)
        received += read_all(sock)
    _, body = dechunk(received)
    assert b"\r" not in body
    assert sse_data(body)[-1] == "[DONE]"
    assert len(sse_data(body)) == 4


def test_failure_after_the_headers_but_before_any_output(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "FIRST_OUTPUT_PATIENCE_SECONDS", 0.01)
    server.script(step_seconds=0.2, fail_after=0, failure="queue_timeout")
    with server.client() as client:
        response = client.post(CHAT, json=BODIES[CHAT])
    assert response.status_code == 200
    assert [event["error"]["code"] for event in sse_data(response.content)] == ["queue_timeout"]


def test_text_survives_as_it_is(server: LiveServer) -> None:
    """Multi-byte characters, and none of them escaped."""
    with server.client() as client:
        raw = client.post(COMPLETIONS, json=BODIES[COMPLETIONS]).content
    text = "".join(event["choices"][0]["text"] for event in sse_data(raw)[:-1])
    assert text == reply_of(server.engine.requests[-1])
    assert any(ord(c) > 127 for c in text)
    assert text.encode()[-1:] in raw


def test_many_streams_at_once(server: LiveServer) -> None:
    """Nothing lost, doubled or mixed up among 60 streams in flight together."""
    gate = server.gate()
    sockets: list[socket.socket] = []
    for i in range(60):
        sockets.append(server.connect())
        sockets[-1].sendall(http_post(CHAT, {**chat_body(f"user {i}", stream=True), "max_tokens": 40}))
    server.until(lambda engine: len(engine.running) == 60)
    requests = [stream.request for stream in server.engine.running.values()]
    expected = {request.prompt_token_ids: reply_of(request)[:40] for request in requests}
    server.open(gate)
    for i, sock in enumerate(sockets):
        sock.settimeout(WAIT)
        _, body = dechunk(read_all(sock))
        sock.close()
        events = sse_data(body)
        text = "".join(event["choices"][0]["delta"]["content"] for event in events[:-1])
        prompt = server.state.tokenizer.encode_chat([{"role": "user", "content": f"user {i}"}])
        assert text == expected[tuple(prompt)]
        assert events[-1] == "[DONE]"
