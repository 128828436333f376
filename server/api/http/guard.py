"""One HTTP connection, with limits that uvicorn lacks: seconds for head, body and a slow reader, bytes of head and
body.

A request that exceeds a limit is refused and its connection closed. If the head is at fault, the application never sees
the request. Doesn't know routes or the engine. `server.py` gives the class to uvicorn. One instance per connection.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.server.api.http.auth import OPEN_PATHS
from guanaco.server.api.http.early_answers import closing_where_early
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.http.half_closed import HalfClosedWatch
from guanaco.server.api.http.old_clients import without_chunks
from guanaco.server.api.http.request_framing import OLD_VERSION, head_fault
from guanaco.server.api.http.upgrades import HttpOnlyParser
from guanaco.server.engine.awake_clock import AwakeTimer

_SPARE_URLS = frozenset(path.encode() for path in OPEN_PATHS)


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits of connections, in seconds, bytes and counts."""

    header_seconds: float = 10.0
    body_seconds: float = 30.0
    keep_alive_seconds: float = 30.0
    write_seconds: float = 30.0  # a client that reads nothing for this long, while data wait, counts as gone
    max_head_bytes: int = 32 << 10
    max_url_bytes: int = 8 << 10
    max_fields: int = 100
    max_body_bytes: int = 32 << 20  # the most that is read, even to throw it away; the application's limit is smaller
    max_chunks: int = 16_384  # a body in a million chunks of one byte would take seconds
    # Bytes of a chunked body besides its data: sizes of chunks, their extensions, and trailers.
    max_chunk_overhead_bytes: int = 512 << 10
    max_connections: int = 1024
    # The one path that takes files, which are larger and take longer; None: there is no such path.
    upload_path: bytes | None = None
    upload_seconds: float = 600.0
    max_upload_bytes: int = 512 << 20
    max_upload_chunks: int = 1 << 20
    # Further connections that may only use the open paths: a probe must not take a full server for a dead one.
    max_spare_connections: int = 32
    spare_header_seconds: float = 1.0


class _Phase(Enum):
    BETWEEN = "between requests"
    HEAD = "head"
    BODY = "body"


class _Refused(GuanacoError):
    """Stops the parser from within its callbacks. `GuardedHttpProtocol._refusal` is the client's error."""


class GuardedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with `limits`. `guarded` makes a subclass with other limits."""

    limits = ConnectionLimits()
    parser: HttpOnlyParser  # type: ignore[assignment]
    count_slow_client: Callable[[], None] = staticmethod(lambda: None)
    count_refused: Callable[[str], None] = staticmethod(lambda _code: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = HttpOnlyParser(self)
        self._phase = _Phase.BETWEEN
        self._closes_after_body = False
        self._read_timer: AwakeTimer | None = None
        self._write_timer: AwakeTimer | None = None
        self._head_bytes = 0  # parsed: names, values, URL
        self._unparsed_head_bytes = 0  # received since the head began; the parser never reports an endless field
        self._num_fields = 0
        self._body_bytes = 0
        self._received_body_bytes = 0  # as received, with chunk sizes; bytes that came with the head are left out
        self._num_chunks = 0
        self._running: RequestResponseCycle | None = None  # `cycle` is the latest request, which may still wait
        self._half_closed: HalfClosedWatch | None = None
        self._refusal: ApiError | None = None
        self._is_spare = False  # above `max_connections`: may only use the open paths

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self.limits.max_connections
        if len(self.connections) > most + self.limits.max_spare_connections:
            self.count_refused(ErrorCode.TOO_MANY_CONNECTIONS)
            transport.abort()
            return
        self._is_spare = len(self.connections) > most
        self._expect_bytes(self.limits.spare_header_seconds if self._is_spare else self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        if self._half_closed is not None:
            self._half_closed.stop()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has ended its side. It still gets the answers to its complete requests."""
        asked = bool(self.pipeline) or (not self._is_idle and self._phase is not _Phase.BODY)
        if asked and self._half_closed is None:
            self._half_closed = HalfClosedWatch(self.loop, self.transport, self._may_send_interim)
        return asked

    @property
    def _is_cut_short(self) -> bool:
        """Whether the running request is the last one received, and its body is incomplete."""
        return self._phase is _Phase.BODY and self._running is self.cycle

    def _may_send_interim(self) -> bool:
        running = self._running
        return running is not None and not running.response_started and running.scope["http_version"] != OLD_VERSION

    def data_received(self, data: bytes) -> None:
        if self._phase is _Phase.HEAD:
            self._unparsed_head_bytes += len(data)
        elif self._phase is _Phase.BODY:
            self._received_body_bytes += len(data)
        elif self._phase is _Phase.BETWEEN and self._read_timer is None and self._is_idle:
            # uvicorn stops its keep-alive timer at any byte, but an empty line does not begin a request
            self._expect_bytes(self.limits.header_seconds)
        super().data_received(data)
        if self._phase is _Phase.HEAD and self._unparsed_head_bytes > self.limits.max_head_bytes:
            self._refuse(_head_too_large())
        overhead = self._received_body_bytes - self._body_bytes
        if self._phase is _Phase.BODY and overhead > self.limits.max_chunk_overhead_bytes:
            self._refuse(ApiError(413, ErrorCode.REQUEST_TOO_LARGE, "the chunks of the body have too long extensions"))

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _is_answered(self) -> bool:
        """Whether the request whose body is being read was answered already."""
        return self._phase is _Phase.BODY and self._is_idle

    @property
    def _is_upload(self) -> bool:
        """Whether the request that is being read brings a file."""
        return self.url == self.limits.upload_path and self.parser.get_method() == b"POST"

    @property
    def _body_seconds(self) -> float:
        return self.limits.upload_seconds if self._is_upload else self.limits.body_seconds

    # Parser callbacks

    def on_message_begin(self) -> None:
        if self._closes_after_body:  # the client has been told that no further request is answered
            raise _Refused
        self._phase = _Phase.HEAD
        self._head_bytes = self._unparsed_head_bytes = self._num_fields = 0
        self._body_bytes = self._received_body_bytes = self._num_chunks = 0
        if self._is_idle:  # otherwise the client also waits for an answer, and its time starts when that ends
            self._expect_bytes(self.limits.header_seconds)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)
        if len(self.url) > self.limits.max_url_bytes:
            self._stop(
                ApiError(414, ErrorCode.URI_TOO_LONG, f"the URL is longer than {self.limits.max_url_bytes} bytes")
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is _Phase.HEAD:  # otherwise a trailer, which must not change headers that were checked
            super().on_header(name, value)
        self._num_fields += 1
        self._head_bytes += len(name) + len(value) + 4  # ": " and CRLF
        if self._head_bytes > self.limits.max_head_bytes or self._num_fields > self.limits.max_fields:
            self._stop(_head_too_large())

    def on_headers_complete(self) -> None:
        if self.parser.get_method() != b"CONNECT" and self.parser.offers_upgrade:
            return
        if self._is_spare and self.url.partition(b"?")[0] not in _SPARE_URLS:
            text = "too many connections are open; try again later, and keep fewer open"
            self._stop(ApiError(503, ErrorCode.TOO_MANY_CONNECTIONS, text, retry_after=1.0))
        version = self.parser.get_http_version()
        if fault := head_fault(self.parser.get_method(), version, self.headers):
            self._stop(ApiError(400, ErrorCode.MALFORMED_REQUEST, fault))
        if version == OLD_VERSION:
            self.expect_100_continue = False  # an HTTP/1.0 client would take the line for its answer
        runs_now = self._is_idle
        super().on_headers_complete()
        self._phase = _Phase.BODY
        if self._is_spare:
            self.cycle.keep_alive = False
        if runs_now:
            self._expect_bytes(self._body_seconds)
        else:  # pipelined: nothing is read until the requests before it are answered
            self._stop_read_timer()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        app = closing_where_early(app, cycle, self._close_after_body)
        is_old = cycle.scope["http_version"] == OLD_VERSION
        super()._start_asgi_task(cycle, without_chunks(app, cycle) if is_old else app)

    def on_chunk_header(self) -> None:
        self._num_chunks += 1
        most = self.limits.max_upload_chunks if self._is_upload else self.limits.max_chunks
        if self._num_chunks > most:
            self._stop(ApiError(413, ErrorCode.REQUEST_TOO_LARGE, "the body comes in too many chunks"))

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > (self.limits.max_upload_bytes if self._is_upload else self.limits.max_body_bytes):
            self._stop(ApiError(413, ErrorCode.REQUEST_TOO_LARGE, "the body is too large"))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.offers_upgrade:
            return
        self._phase = _Phase.BETWEEN
        self._stop_read_timer()
        super().on_message_complete()
        if not self.cycle.response_complete:
            return
        if self._closes_after_body:
            self._close()
        else:  # answered before the body was read: uvicorn has started its own timer and lost it
            self._expect_bytes(self.limits.keep_alive_seconds)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()
        elif self._half_closed is not None and (self._is_idle or self._is_cut_short):
            self._close()  # neither a further request nor the rest of this one can come
        elif self._closes_after_body and self._phase is not _Phase.BODY:
            self._close()
        elif self._phase is _Phase.BODY and not self._is_idle:
            self._expect_bytes(self._body_seconds)
        elif self._phase is _Phase.BODY and self._is_upload:  # answered early: the long time is for files that are kept
            self._expect_bytes(self.limits.body_seconds)
        elif self._phase is _Phase.HEAD:
            self._expect_bytes(self.limits.header_seconds)

    def _close_after_body(self) -> None:
        self._closes_after_body = True

    # Refusals

    def _stop(self, refusal: ApiError) -> None:
        """Refuse the request from within a parser callback. Raises `_Refused`."""
        self._refusal = refusal
        raise _Refused

    def _refuse(self, refusal: ApiError) -> None:
        self._refusal = refusal
        self.send_400_response("")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's words; ours are in `_refusal`)
        """Called by uvicorn for every error of the parser. Writes nothing if a response has begun."""
        if self.transport.is_closing():
            return
        if self._is_answered:
            self._close()
            return
        if self._closes_after_body and not self.cycle.response_complete:
            return  # the error is behind the body of a request whose answer is still being written
        refusal = self._refusal or ApiError(400, ErrorCode.MALFORMED_REQUEST, "this is not a valid HTTP request")
        self._stop_read_timer()
        self.count_refused(refusal.code)
        if self._is_idle or not self.cycle.response_started:
            status, body = refusal.on_path(self.url.partition(b"?")[0].decode("latin-1"), None)
            head = [
                STATUS_LINE[status],
                *(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers),
                *(f"{name}: {value}\r\n".encode() for name, value in refusal.headers().items()),
                b"content-type: application/json\r\nconnection: close\r\n",
                b"content-length: %d\r\n\r\n" % len(body),
            ]
            self.transport.write(b"".join([*head, body]))
        self._close()

    # Timers

    def _expect_bytes(self, seconds: float) -> None:
        self._stop_read_timer()
        self._read_timer = AwakeTimer(self.loop, seconds, self._waited_enough)

    def _waited_enough(self) -> None:
        self._read_timer = None
        if self._phase is _Phase.BETWEEN:
            self._close()  # an idle connection: no request waits for an answer
        else:
            self._refuse(
                ApiError(408, ErrorCode.REQUEST_TIMEOUT, f"the {self._phase.value} of the request took too long")
            )

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
        self._abort_later()

    def _abort_later(self) -> None:
        """Abort the connection unless the client reads in time; a closed transport would wait for it forever."""
        if self._write_timer is None:
            self._write_timer = AwakeTimer(self.loop, self.limits.write_seconds, self._abort)

    def _abort(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self.count_slow_client()
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _head_too_large() -> ApiError:
    return ApiError(431, ErrorCode.HEADERS_TOO_LARGE, "the head of the request is too large, or has too many fields")


def guarded(
    limits: ConnectionLimits, count_slow_client: Callable[[], None], count_refused: Callable[[str], None]
) -> type[GuardedHttpProtocol]:
    """The protocol class for one server; uvicorn makes the instances.

    count_slow_client: called for each connection that is aborted because its client does not read. count_refused:
    called with the error code of each refusal.
    """
    members = {
        "limits": limits,
        "count_slow_client": staticmethod(count_slow_client),
        "count_refused": staticmethod(count_refused),
    }
    return type("GuardedHttpProtocol", (GuardedHttpProtocol,), members)
