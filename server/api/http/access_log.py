"""The log: one JSON object a line, one line per request, with ids, counts and times; never a client's text or keys.

Doesn't know HTTP. The middleware writes the request lines from a `RequestRecord` that the routes fill in.
"""

import contextlib
import json
import logging
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO

from starlette.types import Scope

from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.awake_clock import awake_seconds

access_logger = logging.getLogger("guanaco.access")

_RECORD = "guanaco.record"
_QUEUE_SIZE = 10_000  # lines; a log that nobody reads may lose lines, but it must not stop the event loop
# These write what they handle (addresses, parameters) at debug level.
_TALKATIVE = ("asyncio", "httpcore", "httpx")


@dataclass
class RequestRecord:
    """The data of one HTTP request for the log, filled in while it is served. Times are in seconds since `started`."""

    request_id: str
    started: float = field(default_factory=awake_seconds)  # of a generating request: when its body had arrived
    route: str | None = None  # the route's pattern, not the client's path
    status: int | None = None
    outcome: str | None = None  # ok, rejected, cancelled, failed
    error_code: ErrorCode | None = None
    key_id: str | None = None
    model: str | None = None  # a served name
    adapter_version: str | None = None
    stream: bool | None = None
    num_choices: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reasons: tuple[str, ...] | None = None
    ttft_seconds: float | None = None

    def line(self, method: str) -> dict[str, Any]:
        """The fields of the log line. Unknown ones are left out."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": method if method.isalpha() and len(method) <= 10 else None,
            "route": self.route,
            "status": self.status,
            "outcome": self.outcome,
            "error_code": self.error_code,
            "key_id": self.key_id,
            "model": self.model,
            "adapter_version": self.adapter_version,
            "stream": self.stream,
            "num_choices": self.num_choices,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reasons": self.finish_reasons,
            "ttft_seconds": None if self.ttft_seconds is None else round(self.ttft_seconds, 6),
            "e2e_seconds": round(awake_seconds() - self.started, 6),
        }
        return {name: value for name, value in fields.items() if value is not None}


def record_of(scope: Scope) -> RequestRecord:
    """The record that the outermost middleware put into the scope."""
    record: RequestRecord = scope[_RECORD]
    return record


def new_record(scope: Scope, request_id: str) -> RequestRecord:
    scope[_RECORD] = RequestRecord(request_id)
    return record_of(scope)


def frames(error: BaseException) -> list[str]:
    """Where an exception was raised, innermost last. Its message is left out, as it may quote a client's text."""
    return [f"{f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__)]


class JsonFormatter(logging.Formatter):
    """One record, one line of ASCII JSON: control characters and line separators of any kind come out escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = type(record.exc_info[1]).__name__
            line["stack"] = frames(record.exc_info[1])
        return json.dumps(line, ensure_ascii=True)


class _QueueHandler(logging.Handler):
    """Passes records to the writing thread. If its queue is full, the record is lost."""

    def __init__(self, records: queue.Queue[logging.LogRecord | None]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):  # a log reader that hangs must not stop the server
            self.records.put_nowait(record)


def start_logging(level: str, stream: BinaryIO | None = None) -> Callable[[], None]:
    """Send all logging to `stream` (standard error) as JSON lines, from a thread of its own.

    Returns a function that writes what is still queued and ends the thread, or gives up after two seconds. The stream
    is unbuffered and the writer no `logging.Handler`: their locks, held by a write that never returns (a pipe that
    nobody reads), would keep the interpreter from ending.
    """
    out = stream or open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115 (lives as long as the process)
    formatter = JsonFormatter()
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_QUEUE_SIZE)
    handler = _QueueHandler(records)

    def write() -> None:
        while (record := records.get()) is not None:
            line = formatter.format(record).encode() + b"\n"
            with contextlib.suppress(OSError):  # a closed pipe or a full disk: serving goes on without its log
                while line:
                    line = line[out.write(line) :]

    thread = threading.Thread(target=write, name="guanaco-log", daemon=True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO)  # whatever level is asked for
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its steps of starting and ending
    thread.start()

    def stop() -> None:
        root.removeHandler(handler)
        with contextlib.suppress(queue.Full):  # the reader of the log is stuck: leave the thread, it is a daemon
            records.put(None, timeout=1)
            thread.join(1)

    return stop
