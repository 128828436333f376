"""The end of the process: drains, deadlines, a second signal, a dead engine. In a thread, or in its own process."""

import asyncio
import functools
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guanaco.server.api import app
from guanaco.server.api import server as http_server
from guanaco.server.api.server import EXIT_ENGINE_FAILED, bind, serve
from guanaco.server.config import Settings, SettingsError
from support.children import environment
from support.server.api_server import BASE, WAIT, LiveServer, chat_body, http_post, make_state, read_all, sse_data

CHAT = "/v1/chat/completions"


def open_stream(server: Any, **fields: Any) -> socket.socket:
    sock = server.connect()
    sock.sendall(http_post(CHAT, chat_body("hello", stream=True, **fields)))
    return sock


def body_of(raw: bytes) -> bytes:
    """The data of a response in chunks; sizes are taken out roughly: our events hold no line of hex digits alone."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), raw
    return b"".join(
        part.split(b"\r\n", 1)[-1] for part in rest.split(b"\r\n") if part.startswith((b"data", b"\n", b":"))
    )


class TestDrain:
    def test_running_streams_finish_and_new_work_goes_elsewhere(self) -> None:
        with LiveServer(make_state(drain_delay=0.4, drain_timeout=WAIT)) as server:
            gate = server.gate()
            stream = open_stream(server, max_tokens=20)
            server.until(lambda engine: len(engine.running) == 1)
            with server.client() as client:
                server.server.handle_exit(signal.SIGTERM, None)
                assert client.get("/health/ready").status_code == 503, "routers must look elsewhere at once"
                assert client.get("/health").status_code == 503
                assert client.get("/health/live").status_code == 200
                late = open_stream(server, max_tokens=5)
                server.until(lambda engine: len(engine.running) == 2)  # the delay: still taken
                server.until(lambda engine: engine.draining)
                refused = client.post(CHAT, json=chat_body())
                assert refused.status_code == 503
                assert refused.headers["retry-after"]
                assert refused.headers["connection"] == "close"
                assert refused.json()["error"]["code"] == "server_draining"
                assert client.get("/health/live").status_code == 200, "not dead: only draining"
                assert client.get("/metrics").status_code == 200
            server.open(gate)
            for sock, count in ((stream, 20), (late, 5)):
                events = sse_data(body_of(read_all(sock)))
                assert len(events) == count + 1
                assert events[-1] == "[DONE]"
                sock.close()
            server.join()
            assert server.server.exit_code == 0
            assert server.engine.stopped
            with pytest.raises(ConnectionRefusedError):
                server.connect()

    def test_what_runs_too_long_ends_with_an_error(self) -> None:
        with LiveServer(make_state(drain_timeout=0.3)) as server:
            server.script(step_seconds=0.05)
            stream, whole = open_stream(server), server.connect()
            whole.sendall(http_post(CHAT, chat_body("hello")))
            server.until(lambda engine: len(engine.running) == 2)
            server.server.handle_exit(signal.SIGTERM, None)
            events = sse_data(body_of(read_all(stream)))
            assert events[-1]["error"]["code"] == "server_shutting_down"
            assert "[DONE]" not in events
            answer = read_all(whole)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"server_shutting_down" in answer
            server.join()
            assert server.server.exit_code == 0

    def test_every_kind_of_stream_says_why_it_ended_and_what_was_kept_says_so_too(self) -> None:
        """A response that the drain cut is kept as failed until the process ends; the next one says what became of
        it."""
        with LiveServer(make_state(drain_timeout=0.3)) as server:
            server.script(step_seconds=0.05)
            bodies = {
                "/v1/responses": {"model": BASE, "input": "hello", "stream": True},
                "/v1/messages": {**chat_body("hello", stream=True), "max_tokens": 900},
                "/v1/completions": {"model": BASE, "prompt": "hello", "max_tokens": 900, "stream": True},
            }
            streams = {}
            for path, body in bodies.items():
                streams[path] = server.connect()
                streams[path].sendall(http_post(path, body))
            whole = server.connect()
            whole.sendall(http_post("/v1/responses", {"model": BASE, "input": "hello"}))
            server.until(lambda engine: len(engine.running) == 4)
            server.server.handle_exit(signal.SIGTERM, None)
            last = {
                path: json.loads(read_all(sock).rpartition(b"data: ")[2].partition(b"\n")[0])
                for path, sock in streams.items()
            }
            assert read_all(whole).startswith(b"HTTP/1.1 503")
            for sock in (*streams.values(), whole):
                sock.close()
            server.join()
            assert server.server.exit_code == 0
            failed = last["/v1/responses"]
            assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
            assert "shut down" in failed["response"]["error"]["message"]
            assert last["/v1/messages"]["type"] == "error"
            assert "shut down" in last["/v1/messages"]["error"]["message"]
            assert last["/v1/completions"]["error"]["code"] == "server_shutting_down"
            store = server.server.config.app.state.responses
            assert store._running == {}
            response_id = failed["response"]["id"]
            assert json.loads(store.get(response_id, "").content) == failed["response"]
            assert len(store) == 1, "of the one that was not streamed nobody knows the id"
        with LiveServer(make_state()) as server, server.client() as client:
            gone = client.get(f"/v1/responses/{response_id}")
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
            assert "before the server's last start" in gone.json()["error"]["message"]
            body = {"model": BASE, "input": "and now?", "previous_response_id": response_id}
            refused = client.post("/v1/responses", json=body).json()["error"]
            assert refused["code"] == "previous_response_not_found"
            assert "before the server's last start" in refused["message"]

    def test_idle_server_ends_at_once_kept_alive_connections_or_not(self) -> None:
        with LiveServer(make_state(drain_timeout=WAIT)) as server, server.client() as client:
            assert client.get("/version").status_code == 200
            server.server.handle_exit(signal.SIGINT, None)
            server.join()
            assert server.server.exit_code == 0

    def test_an_engine_that_does_not_drain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_server, "_FLUSH_SECONDS", 0.2)
        monkeypatch.setattr(app, "_STOP_TIMEOUT_SECONDS", 0.2)
        with LiveServer(make_state(drain_timeout=0.1)) as server:

            async def never(*args: object) -> None:
                await asyncio.Event().wait()

            server.engine.drain = server.engine.stop = never
            server.gate()
            stream = open_stream(server)
            server.until(lambda engine: engine.running)
            server.server.handle_exit(signal.SIGTERM, None)
            server.join()
            assert b"[DONE]" not in read_all(stream)
            stream.close()


class TestMoreSignals:
    def test_a_second_one_ends_streams_and_whole_answers_with_an_error(self) -> None:
        with LiveServer(make_state(drain_timeout=WAIT)) as server:
            server.gate()
            stream, whole = open_stream(server), server.connect()
            whole.sendall(http_post(CHAT, chat_body("hello")))
            server.until(lambda engine: len(engine.running) == 2)
            server.server.handle_exit(signal.SIGINT, None)
            server.until(lambda engine: engine.draining)
            server.server.handle_exit(signal.SIGINT, None)
            assert b"server_shutting_down" in read_all(stream)
            assert b"server_shutting_down" in read_all(whole)
            server.join()
            assert server.server.exit_code == 128 + signal.SIGINT
            stream.close()
            whole.close()

    def test_both_before_the_server_looks(self) -> None:
        """Ctrl-C twice within a tenth of a second."""
        with LiveServer(make_state(drain_delay=WAIT)) as server:
            server.gate()
            stream = open_stream(server)
            server.until(lambda engine: engine.running)
            for _ in range(2):
                server.server.handle_exit(signal.SIGINT, None)
            assert b"server_shutting_down" in read_all(stream)
            server.join()
            stream.close()

    @pytest.mark.parametrize("num_signals", [2, 3])
    def test_an_engine_that_ends_nothing_is_left(self, num_signals: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http_server, "_LAST_WORDS_SECONDS", 0.1)
        with LiveServer(make_state()) as server:

            async def never(*args: object) -> None:
                server.engine.draining = True
                server.engine.changed.set()
                await asyncio.Event().wait()

            server.engine.drain = never
            server.gate()
            stream = open_stream(server)
            server.until(lambda engine: engine.running)
            for _ in range(num_signals):
                server.server.handle_exit(signal.SIGTERM, None)
            server.join()
            assert b"[DONE]" not in read_all(stream)
            stream.close()

    def test_a_terminal_that_closes_sends_several_hangups(self) -> None:
        """They drain as one SIGTERM does; a SIGTERM after them ends at once."""
        with LiveServer(make_state(drain_timeout=WAIT)) as server:
            gate = server.gate()
            stream = open_stream(server, max_tokens=5)
            server.until(lambda engine: engine.running)
            for _ in range(3):
                server.server.handle_exit(signal.SIGHUP, None)
            server.until(lambda engine: engine.draining)
            server.open(gate)
            assert sse_data(body_of(read_all(stream)))[-1] == "[DONE]"
            server.join()
            assert server.server.exit_code == 0
            stream.close()


def test_ctrl_c_with_a_closed_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(http_server.os, "write", closed)
    server = http_server.make_server(make_state())
    server.handle_exit(signal.SIGINT, None)
    assert server._state.lifecycle.draining


class TestEngineDeath:
    def test_process_ends_with_an_error_code(self) -> None:
        with LiveServer(make_state()) as server:
            server.gate()
            streams = [open_stream(server) for _ in range(4)]
            server.until(lambda engine: len(engine.running) == 4)
            server.call(server.engine.die)
            for sock in streams:
                assert read_all(sock).startswith(b"HTTP/1.1 500")
                sock.close()
            server.join()
            assert server.server.exit_code == EXIT_ENGINE_FAILED

    def test_death_during_a_drain(self) -> None:
        with LiveServer(make_state(drain_timeout=WAIT)) as server:
            server.gate()
            stream = open_stream(server)
            server.until(lambda engine: engine.running)
            server.server.handle_exit(signal.SIGTERM, None)
            server.until(lambda engine: engine.draining)
            server.call(server.engine.die)
            assert b"engine_unavailable" in read_all(stream)
            server.join()
            assert server.server.exit_code == EXIT_ENGINE_FAILED
            stream.close()


class Process:
    """The server as a process of its own, its log in a file (a pipe that nobody reads could block it)."""

    def __init__(self, log: Path, **options: Any) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.server.serve_fake", json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            cwd=log.parent,
            env=environment(),
        )

    @functools.cached_property
    def port(self) -> int:
        """Known once it takes requests."""
        return int(self.process.stdout.readline())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.process.kill()
        process.process.wait(WAIT)


def test_signals_to_a_real_process(tmp_path: Path, processes: list[Process]) -> None:
    """Three processes at once, since most of the time goes into their start: SIGHUP under a stream, a second Ctrl-C,
    SIGTERM while idle."""
    slow = {"step_seconds": 0.05, "settings": {"drain_timeout": WAIT}}
    processes += [Process(tmp_path / f"{name}.log", **slow) for name in ("drain", "twice", "idle")]
    drain, twice, idle = processes

    stream = drain.connect()
    stream.sendall(http_post(CHAT, chat_body("hello", stream=True, max_tokens=10)))
    first = stream.recv(65536)
    drain.process.send_signal(signal.SIGHUP)
    received = first + read_all(stream)
    assert received.count(b"data: {") == 10
    assert b"data: [DONE]" in received
    assert drain.process.wait(WAIT) == 0
    assert drain.lines()[-1]["exit_code"] == 0
    (line,) = [line for line in drain.lines() if line["logger"] == "guanaco.access"]
    assert (line["status"], line["outcome"], line["completion_tokens"]) == (200, "ok", 10)

    stream = twice.connect()
    stream.sendall(http_post(CHAT, chat_body("hello", stream=True)))
    first = stream.recv(65536)
    twice.process.send_signal(signal.SIGINT)
    with twice.connect() as probe:  # the first signal has been seen
        while b"HTTP/1.1 200" in ready(probe):
            pass
    twice.process.send_signal(signal.SIGINT)
    received = first + read_all(stream)
    assert b"server_shutting_down" in received  # the stream's error event
    assert twice.process.wait(WAIT) == 128 + signal.SIGINT
    assert b"Ctrl-C again ends at once" in twice.log.read_bytes()
    assert b"Traceback" not in twice.log.read_bytes()
    assert b"[DONE]" not in first + read_all(stream)

    idle.connect().close()
    idle.process.send_signal(signal.SIGTERM)
    assert idle.process.wait(WAIT) == 0


def ready(sock: socket.socket) -> bytes:
    sock.sendall(b"GET /health/ready HTTP/1.1\r\nHost: t\r\n\r\n")
    return sock.recv(65536)


def test_port_in_use() -> None:
    with bind(Settings(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen on 127\.0\.0\.1:{port}") as error:
            bind(Settings(port=port))
        assert "\n" not in str(error.value)
    with pytest.raises(SettingsError, match="cannot listen on"):
        bind(Settings(host="not an address", port=0))


def test_port_that_is_taken_and_does_not_listen_yet() -> None:
    """Two servers started together: the second one says so before it loads anything."""
    with bind(Settings(port=0)) as loading:
        port = loading.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            bind(Settings(port=port))


def test_port_that_another_server_listens_on_first() -> None:
    """Both took it in the same moment: the later one ends with the same words, and never says that it has started."""
    state = make_state()
    with bind(state.settings) as ours, socket.socket() as other:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(ours.getsockname())
        other.listen()
        started: list[str] = []
        with pytest.raises(SettingsError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            serve(state, ours, on_started=lambda: started.append("started"))
        assert not started
        assert not state.engine.started


def test_a_restart_takes_the_same_port_at_once() -> None:
    """Connections that the old server closed keep the port for a minute, but for a listener with the right option."""
    with LiveServer(make_state()) as server:
        assert server.raw(b"GET /version HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        port = server.port
    bind(Settings(port=port)).close()


def test_ipv6() -> None:
    try:
        sock = bind(Settings(host="::1", port=0))
    except SettingsError:
        pytest.skip("no IPv6 here")
    assert sock.family == socket.AF_INET6
    sock.close()


def test_engine_that_does_not_start() -> None:
    state = make_state()

    def fail() -> None:
        raise RuntimeError("no")

    state.engine.start = fail
    assert serve(state, bind(state.settings)) != 0
