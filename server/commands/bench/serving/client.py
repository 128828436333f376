"""One streamed request to an OpenAI-compatible server, with the arrival time of each piece of its answer.

Each request has its own connection, so a first token's time includes connecting, as for a new client. The responses go
through httptools' parser. An HTTP library for general use takes longer to read an event than the server takes to write
it, and the load often runs on the server's machine. Events are decoded when the answer has ended.
"""

import asyncio
import enum
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

from guanaco.server.errors import CommandError

REFUSALS = frozenset({429, 503, 529})  # "not now": too many requests, overloaded
_MOST_ERROR_BYTES = 64 << 10
_MOST_EVENT_BYTES = 16 << 20
_MOST_NAME = 60  # characters of a server's error code that are kept


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    REFUSED = "refused"  # 429, 503 or 529: the server said at once that it has no room
    CUT_OFF = "cut_off"  # an answer began and is not whole
    FAILED = "failed"  # no answer: no connection, another status, a time-out before the answer
    CANCELLED = "cancelled"  # we left before its end, as --request-cancellation-rate asks


@dataclass(slots=True)
class Exchange:
    """One request and its answer. Times are in seconds from the start of the run."""

    index: int
    model: str
    due: float
    sent: float | None = None  # when connecting began; None: never
    ended: float = 0.0
    status: int = 0  # 0: no answer
    outcome: Outcome = Outcome.FAILED
    error: str = ""  # a short name of the error; empty for a complete answer
    retry_after: bool = False
    pieces: list[float] = field(default_factory=list)  # when each piece of text came
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None  # this and the next two: as the server's usage counts them
    cached_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def first(self) -> float | None:
        """When the first piece of text came; for a whole answer without text, when it ended."""
        if self.pieces:
            return self.pieces[0]
        return self.ended if self.outcome is Outcome.COMPLETED else None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer: the server's count, or one for each piece if the server gives no count."""
        return len(self.pieces) if self.completion_tokens is None else self.completion_tokens


class Target:
    """A server's address for streamed requests to one path."""

    def __init__(self, root: str, path: str, headers: Mapping[str, str], *, insecure: bool = False) -> None:
        """root: the address without /v1. path: with /v1. insecure: certificates are not checked.

        Raises CommandError for a header that is not printable ASCII text.
        """
        parts = urlsplit(root)
        assert parts.hostname is not None
        self.host, self.is_tls = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self._tls: ssl.SSLContext | None = None
        if self.is_tls:
            self._tls = ssl.create_default_context()
            if insecure:
                self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE
        lines = [f"POST {parts.path}{path} HTTP/1.1", f"Host: {parts.netloc}"]
        sent = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "User-Agent": "guanaco-bench",
            **headers,
        }
        for name, value in sent.items():
            if not (f"{name}{value}".isascii() and f"{name}{value}".isprintable() and name.isprintable()):
                raise CommandError(f"--header {name}: a header is printable ASCII text")
        lines += [f"{name}: {value}" for name, value in sent.items()]
        self._head = "\r\n".join([*lines, "Connection: close", "Content-Length: "]).encode()

    async def connect(self, stream: "AnswerStream") -> asyncio.Transport:
        """A new connection; its answer goes to `stream`. Raises OSError if it can't be made."""
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: stream, self.host, self.port, ssl=self._tls
        )
        return transport

    def request(self, body: Mapping[str, Any]) -> bytes:
        """The bytes of a request."""
        data = orjson.dumps(body)
        return b"%s%d\r\n\r\n%s" % (self._head, len(data), data)


class AnswerStream(asyncio.Protocol):
    """Parses one response into events with their arrival times."""

    def __init__(self) -> None:
        self.status = 0
        self.retry_after = False
        self.is_whole = False  # the response is complete by the rules of HTTP
        self.events: list[tuple[float, bytes]] = []
        self.error_body = b""
        self.problem = ""
        self.ended = asyncio.get_running_loop().create_future()
        self._now = 0.0
        self._rest = b""
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.problem = "not_http"
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and not self.is_whole and not self.problem:
            self.problem = "connection_reset"
        self._end()

    def on_header(self, name: bytes, _value: bytes) -> None:
        self.retry_after = self.retry_after or name.lower() == b"retry-after"

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self.status != 200:
            self.error_body = (self.error_body + data)[:_MOST_ERROR_BYTES]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.events += [(self._now, line[5:].strip()) for line in lines if line.startswith(b"data:")]
        if len(self._rest) > _MOST_EVENT_BYTES:
            self.problem = "endless_event"
            self._end()

    def on_message_complete(self) -> None:
        self.is_whole = True
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        if self._transport is not None:
            self._transport.close()


async def ask(
    target: Target,
    body: Mapping[str, Any],
    exchange: Exchange,
    *,
    start: float,
    timeout: float,
    leave_after: float | None = None,
) -> None:
    """Send one request, and write its outcome, times and text into `exchange`.

    body: the JSON object to send; it must ask for a stream. start: `time.perf_counter()` at the run's start. timeout:
    seconds for connecting and the whole answer together. leave_after: seconds after the request was written, which is
    after connecting, at which we close the connection even in the middle of the answer (None: never).

    Raises nothing for a failed connection, a time-out or a bad answer: `exchange.outcome` and `error` tell.
    """
    data = target.request(body)
    exchange.sent = time.perf_counter() - start
    stream = AnswerStream()
    transport = None
    has_left = False
    try:
        async with asyncio.timeout(timeout):
            transport = await target.connect(stream)
            transport.write(data)
            await asyncio.wait([stream.ended], timeout=leave_after)
            has_left = not stream.ended.done()
    except TimeoutError:
        stream.problem = "timeout"
    except ssl.SSLError:
        stream.problem = "tls"
    except OSError as error:
        stream.problem = type(error).__name__
    finally:
        if transport is not None:
            transport.abort()
    exchange.ended = time.perf_counter() - start
    exchange.status, exchange.retry_after = stream.status, stream.retry_after
    if stream.status == 200:
        _read_answer(stream, exchange, start)
    else:
        exchange.outcome = Outcome.REFUSED if stream.status in REFUSALS else Outcome.FAILED
        exchange.error = stream.problem or _name_of(stream.error_body, f"status_{stream.status}")
    if has_left:
        exchange.outcome, exchange.error = Outcome.CANCELLED, ""
    elif stream.problem == "timeout" and stream.status != 200:
        exchange.outcome = Outcome.FAILED


def _read_answer(stream: AnswerStream, exchange: Exchange, start: float) -> None:
    """Decode the events, and decide whether the answer is whole: text, one finish reason, [DONE] at the end."""
    problem, num_done, texts, reasons = stream.problem, 0, [], []
    for when, data in stream.events:
        if data == b"[DONE]":
            num_done += 1
            continue
        if num_done:
            problem = problem or "event_after_done"
        try:
            event = orjson.loads(data)
            if event.get("error") is not None:
                problem = problem or _name_of(data, "error_event")
                continue
            _take_usage(event.get("usage"), exchange)
            for choice in event["choices"]:
                text, reason = _piece(choice)
                if not isinstance(text, str):
                    raise TypeError("a piece is text")
                if text:
                    texts.append(text)
                    exchange.pieces.append(when - start)
                if reason is not None:
                    reasons.append(reason)
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
            problem = problem or "unreadable_event"
    exchange.text = "".join(texts)
    exchange.finish_reason = reasons[0] if reasons else None
    exchange.error = problem or _missing(reasons, num_done, is_whole=stream.is_whole)
    exchange.outcome = Outcome.CUT_OFF if exchange.error else Outcome.COMPLETED
    if stream.events and not exchange.error:
        exchange.ended = stream.events[-1][0] - start  # [DONE]; the connection's end may be read later


def _piece(choice: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text of a chat's or a completion's choice, thoughts included, and its finish reason."""
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or "", choice.get("finish_reason")
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    if not text and delta.get("tool_calls"):
        text = "".join((call.get("function") or {}).get("arguments") or "" for call in delta["tool_calls"])
    return text, choice.get("finish_reason")


def _missing(reasons: Sequence[str], num_done: int, *, is_whole: bool) -> str:
    """A short name of the first thing that a stream without errors lacks; empty if the stream is whole."""
    if not reasons:
        return "no_finish_reason"
    if len(reasons) > 1:
        return "several_finish_reasons"
    if reasons[0] in ("error", "abort"):
        return f"finish_reason_{reasons[0]}"
    if num_done != 1:
        return "no_done" if num_done == 0 else "several_done"
    return "" if is_whole else "connection_closed"


def _take_usage(usage: object, exchange: Exchange) -> None:
    if not isinstance(usage, dict):
        return
    for name in ("prompt_tokens", "completion_tokens"):
        if isinstance(usage.get(name), int):
            setattr(exchange, name, usage[name])
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
        exchange.cached_tokens = details["cached_tokens"]


def _name_of(body: bytes, default: str) -> str:
    """The code or the type of a server's error, as a short name; `default` if it has none."""
    try:
        error = orjson.loads(body)["error"]
        name = error.get("code") or error.get("type") if isinstance(error, dict) else None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        name = None
    text = str(name) if name is not None else default
    return "".join(c for c in text if c.isprintable())[:_MOST_NAME] or default
