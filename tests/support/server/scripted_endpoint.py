"""An OpenAI-compatible endpoint over real HTTP whose answers are a function of the request: contestants and judges."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

# status, headers, body: an object becomes JSON, bytes are sent as they are
Reply = tuple[int, dict[str, str], Any]


def chat_answer(text: str, **usage: int) -> Reply:
    """A chat completion with one choice."""
    tokens = {"prompt_tokens": 10, "completion_tokens": len(text.split()), **usage}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {}, {"object": "chat.completion", "choices": [choice], "usage": tokens}


def judged(body: dict[str, Any]) -> tuple[str, str, str]:
    """What a judge was asked: the first answer, the second answer, and the whole text outside of the fences."""
    text = body["messages"][-1]["content"]
    marker = re.search(r"The marker is (\w+)\.", text)[1]  # type: ignore[index]
    fenced = re.findall(rf"\[{marker}\]\n(.*?)\n\[/{marker}\]", text, re.DOTALL)
    outside = re.sub(rf"\[{marker}\]\n.*?\n\[/{marker}\]", "", text, flags=re.DOTALL)
    return fenced[-2], fenced[-1], outside


class ScriptedEndpoint:
    """`with ScriptedEndpoint(answer) as endpoint:` answers POSTs with `answer(path, body)` and GETs with `card(path)`.

    requests: path, headers and body of each request so far.
    """

    def __init__(
        self, answer: Callable[[str, dict[str, Any]], Reply], card: Callable[[str], Reply] | None = None
    ) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = 1 << 16  # head and body in one packet

            def do_GET(self) -> None:
                requests.append((self.path, dict(self.headers), {}))
                self._send(*(card(self.path) if card else (404, {}, {"error": {"message": "no such route"}})))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                self._send(*answer(self.path, body))

            def _send(self, status: int, headers: dict[str, str], body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                    self.wfile.flush()
                except OSError:
                    pass  # the client did not wait

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def chats(self) -> list[dict[str, Any]]:
        """The bodies of the chat requests so far."""
        return [body for path, _, body in self.requests if path.endswith("/chat/completions")]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def slow(seconds: float, reply: Reply) -> Reply:
    """A reply that comes late."""
    time.sleep(seconds)
    return reply


@contextmanager
def endless_endpoint() -> Iterator[str]:
    """The address of a server whose answers have no end."""

    class Handler(BaseHTTPRequestHandler):
        def _go_on(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the client leaves
                while True:
                    self.wfile.write(b" " * (1 << 16))

        do_GET = do_POST = do_PUT = _go_on

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
