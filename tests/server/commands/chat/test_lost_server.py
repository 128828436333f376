"""`guanaco chat` with a server that is lost in the middle, or that is no server of models: one line says so."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from guanaco.server.commands.chat.client import AnswerFigures, ChatClient
from guanaco.server.errors import CommandError

PIECE = b'data: {"choices": [{"delta": {"content": "Boil"}}]}\n\n'


@contextmanager
def client_of(body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> Iterator[ChatClient]:
    """A client of a server that answers every request with these bytes, and then closes the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield ChatClient(f"http://127.0.0.1:{server.server_port}", api_key=None, options={})
        finally:
            server.shutdown()
            thread.join()


def failure(client: ChatClient, pieces: list[str] | None = None) -> str:
    """The error of one answer, or of the list of models if `pieces` is None; it is one line."""
    answer = None if pieces is None else client.stream("base", [], AnswerFigures(0.0))
    with pytest.raises(CommandError) as raised:
        client.models() if pieces is None or answer is None else pieces.extend(answer)
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PIECE + b"da", {"Content-Length": "1000"}),
        (b"%x\r\n%s\r\n40\r\nda" % (len(PIECE), PIECE), {"Transfer-Encoding": "chunked"}),
        (PIECE, {}),
    ],
    ids=["length", "chunked", "close"],
)
def test_a_server_that_is_lost_in_an_answer(body: bytes, headers: dict[str, str]) -> None:
    with client_of(body, headers) as client:
        pieces: list[str] = []
        assert "ended the connection before its answer was whole" in failure(client, pieces)
    assert pieces == ["Boil"]


@pytest.mark.parametrize(
    "event", [b"{", b"[]", b"3", b'{"choices": [{}]}', b'{"error": "x"}', b'{"usage": {"a": 1}}', b"\xff"]
)
def test_an_event_of_another_shape(event: bytes) -> None:
    with client_of(b"data: " + event + b"\n\ndata: [DONE]\n\n") as client:
        assert "in another form than OpenAI's" in failure(client, [])


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"3", b'{"data": 3}', b'{"data": [{}]}', b'{"data": [{"id": 3}]}'])
def test_a_list_of_models_of_another_shape(body: bytes) -> None:
    with client_of(body) as client:
        assert "/v1/models answered in another form than OpenAI's" in failure(client)


def test_an_empty_list_of_models() -> None:
    with client_of(b'{"data": []}') as client:
        assert "lists no model" in failure(client)


def test_a_list_or_an_error_that_ends_early() -> None:
    with client_of(b'{"data"', {"Content-Length": "99"}) as client:
        assert "ended the connection" in failure(client)
    with client_of(b'{"err', {"Content-Length": "99"}, status=503) as client:
        assert failure(client) == "the server answered 503 Service Unavailable"
