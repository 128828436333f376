"""A server whose streams are right, or wrong in one way each, by the model that is asked for. It can stand still."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

MODELS = ("good", "other")
NUM_PIECES = 4


def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> bytes:
    event = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2}}
ROLE, TEXT, END = chunk({"role": "assistant", "content": ""}), chunk({"content": "word "}), chunk({}, "stop")
COUNTS = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
DONE = b"data: [DONE]\n\n"
TEXTS = TEXT * NUM_PIECES
# Model → the body of its stream. `reset` means: the connection breaks there.
STREAMS: dict[str, list[bytes | str]] = {
    "good": [ROLE, *[TEXT] * NUM_PIECES, END, COUNTS, DONE],
    "silent": [ROLE, END, COUNTS, DONE],
    "no end": [ROLE, TEXTS, COUNTS, DONE],
    "no done": [ROLE, TEXTS, END, COUNTS],
    "two ends": [ROLE, TEXTS, END, END, DONE],
    "two done": [ROLE, TEXTS, END, DONE, DONE],
    "after done": [ROLE, TEXTS, END, DONE, TEXT],
    "error": [ROLE, TEXTS, b'data: {"error": {"code": "engine_dead"}}\n\n', DONE],
    "failed": [ROLE, TEXTS, chunk({}, "error"), DONE],
    "not json": [ROLE, TEXTS, b"data: {\n\n", END, DONE],
    "no text": [ROLE, TEXTS, chunk({"content": 5}), END, DONE],
    "reset": [ROLE, TEXTS, "reset"],
    "reset late": [ROLE, TEXTS, END, DONE, "reset"],
}
# Model → status, headers, body of its refusal.
REFUSALS: dict[str, tuple[int, str, bytes]] = {
    "busy": (503, "Retry-After: 1\r\n", b'{"error": {"code": "server_overloaded"}}'),
    "limited": (429, "", b'{"error": {"type": "rate_limit", "code": null}}'),
    "unknown": (404, "", b'{"error": {"code": "model_not_found"}}'),
    "broken": (500, "", b"<html>"),
}


class StreamStub:
    """`with StreamStub() as stub:`; `stub.url`, and `stub.bodies` and `stub.heads` of what came.

    cut: answers come in pieces of so many bytes, wherever that cuts them (0: as they are). begun: called with each body
    before it is answered; an async function may wait there.
    """

    def __init__(self, *, cut: int = 0, models: tuple[str, ...] = MODELS, begun: Callable[[Any], Any] | None = None):
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self._cut, self._models, self._begun = cut, models, begun
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def freeze(self, seconds: float) -> None:
        """Stand still from now on: nothing is accepted, read or answered. Any thread may call it."""
        self.loop.call_soon_threadsafe(time.sleep, seconds)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._ended.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            if head.startswith("GET"):
                self._send(writer, 200, "", json.dumps({"data": [{"id": name} for name in self._models]}).encode())
            else:
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                if self._begun is not None:
                    await self._begun(body)
                await self._reply(writer, body["model"])
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left

    def _send(self, writer: asyncio.StreamWriter, status: int, headers: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)

    async def _reply(self, writer: asyncio.StreamWriter, model: str) -> None:
        if model in REFUSALS:
            self._send(writer, *REFUSALS[model])
            return
        if model == "no http":
            writer.write(b"SSH-2.0-x\r\n\r\n")
            return
        if model == "never":
            await self._ended.wait()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in STREAMS.get(model, STREAMS["good"]):
            if isinstance(part, str):
                await writer.drain()
                writer.transport.abort()
                return
            data = b"%x\r\n%s\r\n" % (len(part), part)
            for at in range(0, len(data), self._cut or len(data)):
                writer.write(data[at : at + (self._cut or len(data))])
                if self._cut:
                    await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
