"""One request, one line of JSON; nothing that a client wrote in it, whatever the client tries."""

import io
import json
import logging
import time
from collections.abc import Iterator

import pytest

from guanaco.server.api.http.access_log import JsonFormatter, start_logging
from support.server.api_server import BASE, PIRATE, PIRATE_VERSION, LiveServer, chat_body, http_post, make_state
from support.server.fake_engine import reply_of

CANARY = "kanari7c1"
KEY = "sk-kanari7c1-key"


class Log:
    """All logging at DEBUG, as the server process writes it."""

    def __init__(self) -> None:
        self.stream = io.BytesIO()
        self.stop = start_logging("debug", self.stream)

    def text(self) -> str:
        self.stop()
        return self.stream.getvalue().decode()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.text().splitlines()]

    def requests(self) -> list[dict]:
        return [line for line in self.lines() if line["logger"] == "guanaco.access"]


@pytest.fixture
def log() -> Iterator[Log]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Log()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


def test_one_line_per_request_with_what_matters(server: LiveServer, log: Log) -> None:
    server.script(cached_tokens=3)
    body = {**chat_body("hello", max_tokens=12, n=2), "model": PIRATE}
    with server.client() as client:
        for streaming in (False, True):
            answer = client.post(
                "/v1/chat/completions", json={**body, "stream": streaming}, headers={"X-Request-Id": "r1"}
            )
            assert answer.status_code == 200
    server.assert_quiet()
    lines = log.requests()
    assert len(lines) == 2
    for line, streaming in zip(lines, (False, True), strict=True):
        assert 0 < line.pop("ttft_seconds") <= line.pop("e2e_seconds")
        assert line.pop("time")
        assert line == {
            "level": "info",
            "logger": "guanaco.access",
            "message": "request",
            "request_id": "r1",
            "method": "POST",
            "route": "/v1/chat/completions",
            "status": 200,
            "outcome": "ok",
            "model": PIRATE,
            "adapter_version": PIRATE_VERSION,
            "stream": streaming,
            "num_choices": 2,
            "prompt_tokens": 9,
            "cached_tokens": 3,
            "completion_tokens": 24,
            "finish_reasons": ["length", "length"],
        }


def test_outcomes(server: LiveServer, log: Log) -> None:
    with server.client() as client:
        client.get("/v1/models")
        client.get("/nope")
        client.post("/v1/completions", json={"model": BASE})
        client.post("/v1/completions", json={"model": CANARY, "prompt": "x"})
        server.script(fail_after=2, failure="numerical_error")
        client.post("/v1/completions", json={"model": BASE, "prompt": "x"})
        client.post("/v1/completions", json={"model": BASE, "prompt": "x", "stream": True})
        server.script(raise_on_submit=RuntimeError("x"))
        client.post("/v1/completions", json={"model": BASE, "prompt": "x"})
        server.state.lifecycle.refusing = True
        client.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    server.assert_quiet()
    seen = [(r["status"], r["outcome"], r.get("error_code"), r.get("route")) for r in log.requests()]
    route = "/v1/completions"
    assert seen == [
        (200, "ok", None, "/v1/models"),
        (404, "rejected", "not_found", None),
        (400, "rejected", "missing_required_parameter", route),
        (404, "rejected", "model_not_found", route),
        (500, "failed", "numerical_error", route),
        (200, "failed", "numerical_error", route),
        (500, "failed", "internal_error", route),
        (503, "rejected", "server_draining", None),
    ]


def test_health_and_metrics_are_quiet() -> None:
    stream = io.BytesIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stop = start_logging("info", stream)
    try:
        with LiveServer(make_state()) as server, server.client() as client:
            for path in ("/health", "/health/live", "/metrics", "/version"):
                client.get(path)
    finally:
        stop()
        root.handlers[:] = handlers
        root.setLevel(level)
    routes = [json.loads(line).get("route") for line in stream.getvalue().decode().splitlines()]
    assert [route for route in routes if route] == ["/version"]


def test_nothing_of_the_clients_text_or_key_is_logged() -> None:
    """At DEBUG, over every way in: prompt, answer, key, header, path, query, model, broken bodies, our own crash."""
    stream = io.BytesIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stop = start_logging("debug", stream)
    try:
        with LiveServer(make_state(keys=(KEY,))) as server:
            auth = {"Authorization": f"Bearer {KEY}"}
            with server.client(headers=auth) as client:
                for body in (
                    chat_body(CANARY, stream=True, max_tokens=30),
                    chat_body(CANARY, user=CANARY, stop=[CANARY], cache_salt=CANARY),
                    {**chat_body(CANARY), "model": CANARY},
                    chat_body(CANARY, temperature=CANARY),
                    {"model": BASE, "messages": [{"role": "assistant", "content": CANARY}]},
                ):
                    client.post("/v1/chat/completions", json=body)
                reply = reply_of(server.engine.requests[0])[:10]
                server.script(raise_on_submit=RuntimeError(CANARY))
                client.post("/v1/chat/completions", json=chat_body(CANARY))
                client.get(f"/{CANARY}?q={CANARY}", headers={"User-Agent": CANARY, "X-Other": CANARY})
                client.get(f"/v1/models/{CANARY}")
                client.get("/v1/models", headers={"Authorization": f"Bearer {CANARY}"})
                client.post(
                    "/v1/completions", content=f'{{"prompt": "{CANARY}', headers={"Content-Type": "application/json"}
                )
                server.raw(f"GET /{CANARY} HTTP/1.1\r\n{CANARY} : x\r\n\r\n".encode())
                metrics = client.get("/metrics").text
    finally:
        stop()
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = stream.getvalue().decode().splitlines()
    text = "\n".join(
        line for line in lines if json.loads(line)["logger"] not in ("httpx", "httpcore")
    )  # the client's own
    assert text.count('"request"') >= 8
    assert CANARY not in text
    assert CANARY not in metrics
    assert KEY not in text
    assert reply not in text
    assert "delta" not in text, "events are logged"


@pytest.mark.parametrize(
    "evil",
    [
        *("%0d%0a{FORGED}", "%0a", "%1b[2J", "%00", "%c2%85x", "%e2%80%a8x", "%22,%22status%22:200", "%ff%fe", "\\n"),
        *("%0d%0a%0d%0aHTTP/1.1 200 OK".replace(" ", "%20"), "%e2%80%ae", "%7f"),
    ],
)
def test_log_lines_cannot_be_forged(server: LiveServer, log: Log, evil: str) -> None:
    server.raw(f"GET /{evil} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())
    server.raw(f"GET /v1/models/{evil}?x={evil} HTTP/1.1\r\nHost: {evil}\r\nConnection: close\r\n\r\n".encode())
    body = json.dumps({"model": "a\r\nb\x1b\x85\u2028" + evil, "prompt": "x"}).encode()
    server.raw(http_post("/v1/completions", body, headers={"X-Request-Id": evil, "User-Agent": evil}))
    server.assert_quiet()
    assert len(log.requests()) == 3


def test_formatter_escapes_all_that_ends_a_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\r\nb\u2028c\x85d\x1be\x7f", (), None)
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert json.loads(line)["message"] == "a\r\nb\u2028c\x85d\x1be\x7f"


def test_formatter_shows_where_an_error_came_from_but_not_its_text() -> None:
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "m", (), (ValueError, error, error.__traceback__))
    line = json.loads(JsonFormatter().format(record))
    assert line["exception"] == "ValueError"
    assert "test_access_log.py" in line["stack"][-1]
    assert CANARY not in json.dumps(line)


class _StuckStream(io.BytesIO):
    """A log that nobody reads: writing never returns."""

    def write(self, data: bytes) -> int:
        time.sleep(600)
        return len(data)


def test_a_stuck_log_does_not_stop_the_server(server: LiveServer) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stop = start_logging("debug", _StuckStream())
    try:
        with server.client() as client:
            for _ in range(20):
                assert client.get("/v1/models").status_code == 200
        stop()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
