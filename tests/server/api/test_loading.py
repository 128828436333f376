"""The port before the model is there: what it answers, and that no connection is lost when the server takes it over."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from guanaco.server.api.loading import LoadingProgress, answering_while_loading
from guanaco.server.api.server import bind
from guanaco.server.commands import serve
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError
from support.server.api_server import BASE, WAIT, LiveServer, chat_body, http_post, make_state, read_all

HTML = {"Accept": "text/html,application/xhtml+xml"}


class Loading:
    """A port that answers as while a model loads."""

    def __init__(self, settings: Settings) -> None:
        self.sock = bind(settings)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"
        self.answering = answering_while_loading(settings, self.sock)

    def __enter__(self) -> "Loading":
        self.progress = self.answering.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.answering.__exit__(None, None, None)
        self.sock.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=WAIT, verify=False, **options)


@pytest.fixture(scope="module")
def loading() -> Iterator[Loading]:
    with Loading(Settings(port=0, allow_origin=("https://chat.example",))) as loading:
        loading.progress.report("model", 63, 100)
        yield loading


def test_progress_in_words() -> None:
    progress = LoadingProgress()
    assert (str(progress), progress.percent) == ("loading (start)", None)
    progress.report("download", 1 << 30, 3 << 30)
    assert str(progress) == "loading 33 % (download)"
    progress.report("download", 5, 4)  # a file was larger than its server had said
    assert progress.percent == 100
    progress.report("model", 0, 0)
    assert str(progress) == "loading (model)"


def test_it_lives_and_is_not_ready(loading: Loading) -> None:
    live = loading.request("GET", "/health/live")
    assert (live.status_code, live.json()) == (200, {"status": "live"})
    ready = loading.request("GET", "/health/ready")
    assert ready.status_code == 503
    assert ready.headers["retry-after"] == "5"
    assert ready.json() == {
        "status": "loading",
        "stage": "model",
        "percent": 63,
        "message": "loading 63 % (model)",
    }
    assert ready.headers["connection"] == "close", "the next request is for the server that comes"
    health = loading.request("GET", "/health")
    assert (health.status_code, health.content) == (503, b"")
    assert [loading.request("HEAD", path).status_code for path in ("/health/live", "/health/ready")] == [200, 503]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/metrics"),
        ("GET", "/"),
        ("DELETE", "/nothing"),
    ],
)
def test_everything_else_is_refused_for_now(loading: Loading, method: str, path: str) -> None:
    answer = loading.request(method, path, content=b"{" * 100_000 if method == "POST" else None)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("server_loading", "server_error")
    assert "loading 63 % (model)" in error["message"]
    assert "/health/ready" in error["message"]


def test_anthropics_clients_get_their_own_shape(loading: Loading) -> None:
    answer = loading.request("POST", "/v1/messages", json={})
    assert answer.status_code == 503
    assert answer.json()["type"] == "error"
    assert "loading 63 %" in answer.json()["error"]["message"]


def test_a_browser_sees_a_page_that_asks_again(loading: Loading) -> None:
    answer = loading.request("GET", "/", headers=HTML)
    assert (answer.status_code, answer.headers["content-type"]) == (503, "text/html; charset=utf-8")
    assert "Loading 63 % (model)" in answer.text
    assert '<progress max="100" value="63">' in answer.text
    assert 'http-equiv="refresh"' in answer.text
    with Loading(Settings(port=0, page=False)) as without:
        assert without.request("GET", "/", headers=HTML).json()["error"]["code"] == "server_loading"


def test_pages_of_an_allowed_origin_may_read_it(loading: Loading) -> None:
    answer = loading.request("GET", "/v1/models", headers={"Origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert answer.status_code == 503


def test_the_limits_of_connections_hold(loading: Loading) -> None:
    port = loading.sock.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as sock:
        sock.sendall(b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 414")


def test_no_connection_is_lost_when_the_server_takes_over() -> None:
    """One client asks without a pause, another has connected before the end and sends its request after it."""
    live = LiveServer(make_state())
    answering = answering_while_loading(live.state.settings, live.sock)
    answering.__enter__()
    statuses: list[int] = []
    enough = threading.Event()
    seen = threading.Semaphore(0)

    def ask() -> None:
        while not enough.is_set():
            statuses.append(httpx.get(live.url + "/health/ready", timeout=WAIT, verify=False).status_code)
            seen.release()

    asking = threading.Thread(target=ask)
    asking.start()
    early = live.connect()
    early.sendall(b"GET /v1/models HTTP/1.1\r\n")
    assert seen.acquire(timeout=WAIT)
    ending = threading.Thread(target=answering.__exit__, args=(None, None, None))
    ending.start()
    early.sendall(b"Host: t\r\n\r\n")
    assert b"server_loading" in read_all(early)
    ending.join(WAIT)
    late = live.connect()  # nobody listens to it yet: it waits
    late.sendall(http_post("/v1/chat/completions", chat_body("hello", max_tokens=1)))
    with live:
        assert late.recv(15) == b"HTTP/1.1 200 OK"
        while 200 not in statuses:
            assert seen.acquire(timeout=WAIT)
        enough.set()
        asking.join(WAIT)
        with live.client() as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == BASE
    late.close()
    early.close()
    assert statuses == sorted(statuses, reverse=True), "503 until it is ready, then 200"
    assert set(statuses) == {503, 200}


def test_a_load_that_fails_ends_with_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port was open; it is closed again, and the exception is the loader's."""
    ports: list[int] = []
    bound = serve.bind

    def remember(settings: Settings) -> socket.socket:
        sock = bound(settings)
        ports.append(sock.getsockname()[1])
        return sock

    def fail(*_: object, watch: Any, **__: object) -> None:
        watch("model", 1, 4)
        url = f"http://127.0.0.1:{ports[0]}"
        assert httpx.get(url + "/health/ready", verify=False).json()["message"] == "loading 25 % (model)"
        raise CommandError("model.safetensors is damaged: download it again")

    monkeypatch.setattr(serve, "bind", remember)
    monkeypatch.setattr(serve, "build_runtime", fail)
    with pytest.raises(CommandError, match=r"model\.safetensors is damaged"):
        serve.run_server(Settings(port=0))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), timeout=WAIT)
