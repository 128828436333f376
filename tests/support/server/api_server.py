"""The real HTTP server over the fake engine: on a free port, in a thread of this process, its loop within reach."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import httpx

from guanaco.server.api.generation.catalog import Catalog, ServedModel
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.api.server import bind, make_server
from guanaco.server.config import Settings
from guanaco.server.metrics.server import Metrics
from support.server.fake_engine import FakeEngine, FakeTokenizer, Script

BASE, PIRATE, TERSE = "org/base-model", "pirate", "terse"
PIRATE_VERSION, TERSE_VERSION = "a" * 64, "b" * 64
MAX_MODEL_LEN = 4096
WAIT = 30.0  # seconds that any wait of a test may take before the test fails

RAW_HOSTS = ("t", "test")  # what raw requests in the tests send as Host


def make_state(*, keys: tuple[str, ...] = (), max_model_len: int = MAX_MODEL_LEN, **settings: Any) -> ApiState:
    base = ServedModel(BASE, max_model_len, root="org/base-model", created=1_700_000_000)
    adapters = [
        ServedModel(PIRATE, max_model_len, root="pirate", parent=BASE, version=PIRATE_VERSION),
        ServedModel(TERSE, max_model_len, root="terse", parent=BASE, version=TERSE_VERSION),
    ]
    metrics = Metrics(BASE, max_model_len=max_model_len, adapter_slots=4)
    metrics.adapters.set_names({PIRATE_VERSION: PIRATE, TERSE_VERSION: TERSE})
    return ApiState(
        engine=FakeEngine(),
        tokenizer=FakeTokenizer(),
        catalog=Catalog(base, adapters),
        settings=Settings(port=0, **{"allowed_host": RAW_HOSTS, **settings}),
        metrics=metrics,
        version="1.2.3",
        keys=KeyRing(keys),
    )


class LiveServer:
    """A server in a thread. `with LiveServer(state) as server:`"""

    def __init__(self, state: ApiState) -> None:
        self.state = state
        self.engine: FakeEngine = state.engine
        self._started = threading.Event()
        self.sock = bind(state.settings)
        self.port: int = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(state, self._started.set)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            self.loop = runner.get_loop()
            runner.run(self.server.serve(sockets=[self.sock]))

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        assert self._started.wait(WAIT)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.join()

    def join(self) -> None:
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the server did not end"

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, WAIT), self.loop).result(WAIT + 1)

    def call(self, function: Callable[[], Any]) -> Any:
        async def work() -> Any:
            return function()

        return self.run(work())

    def until(self, condition: Callable[[FakeEngine], bool]) -> None:
        """Wait until the engine is as `condition` says."""
        self.run(self.engine.until(lambda: condition(self.engine)))

    def assert_quiet(self) -> None:
        """Nothing of any request is left: not in the engine, not on the way there, not on the way back."""

        async def quiet() -> int:
            await self.engine.until(lambda: not self.engine.running)
            assert await self.state.lifecycle.wait_all_closed(WAIT)
            return self.state.lifecycle.num_admitted

        assert self.run(quiet()) == 0

    def script(self, **fields: Any) -> None:
        """Choose what the engine does with the requests that come from now on."""
        self.call(lambda: setattr(self.engine, "script", Script(**fields)))

    def gate(self) -> asyncio.Event:
        """A closed gate before every token. Open it with `open`."""
        event = asyncio.Event()
        self.script(gate=event)
        return event

    def open(self, gate: asyncio.Event) -> None:
        self.loop.call_soon_threadsafe(gate.set)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT, verify=False, **options)  # no TLS context to load

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are; everything that comes until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    try:
        while data := sock.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass  # the end of a connection that was closed with our bytes unread
    return received


def http_post(path: str, body: object, *, close: bool = True, headers: dict[str, str] | None = None) -> bytes:
    """A request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *(["Connection: close"] if close else []),
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **fields}


def sse_data(body: bytes) -> list[Any]:
    """The data of every event, as vLLM's benchmark client reads a stream: split at blank lines, comments skipped."""
    events = []
    for part in body.split(b"\n\n"):
        if not part.strip() or part.startswith(b":"):
            continue
        assert part.startswith(b"data: "), part
        text = part.removeprefix(b"data: ").decode()
        events.append(text if text == "[DONE]" else json.loads(text))
    return events
