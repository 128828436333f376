"""Two of the layers around every request. The outermost gives it an id, a record and a log line; the other is the gate
for new work.

Pure ASGI throughout: Starlette's BaseHTTPMiddleware hides a client's leaving from the routes inside it.
"""

import logging
import re
import secrets
from collections.abc import Awaitable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guanaco.server.api.http.access_log import RequestRecord, access_logger, new_record
from guanaco.server.api.http.auth import OPEN_PATHS
from guanaco.server.api.http.error_paths import OVERLOADED_STATUSES, is_anthropic
from guanaco.server.api.http.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    ClientGone,
    as_api_error,
    draining,
    is_unforeseen,
    overloaded,
)
from guanaco.server.api.http.lifecycle import Lifecycle
from guanaco.server.engine.awake_clock import awake_seconds
from guanaco.server.metrics.server import Metrics

logger = logging.getLogger("guanaco.api")

# A client's X-Request-Id of this form is used in logs and in the response. Any other one is replaced.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
PAGE_ROUTE = "/page"  # the name of all files of the bundled page in the log
# What ends work, and what an operator changes: see `Gate`.
_ENDS_WORK = re.compile(r"/v1/(drain|(responses|fine_tuning/jobs)/[^/]+/cancel)/?")
_OPERATES = re.compile(r"/v1/((un)?load_lora_adapter|(adapters|aliases|fine_tuning)/.+)")
# Called every few seconds, or a dozen at a time, so logged at debug level and left out of the HTTP metrics.
_QUIET_ROUTES = frozenset({*OPEN_PATHS, "/metrics", PAGE_ROUTE})


class RequestScope:
    """The outermost layer of a request: gives it an id and a record, answers if no inner layer has answered, and writes
    its log line."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record, began = new_record(scope, _request_id(scope)), awake_seconds()

        def send_with_id(message: Message) -> Awaitable[None]:  # no coroutine of its own: streams send for each token
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                if is_anthropic(scope["path"]):
                    headers["Request-Id"] = record.request_id
                if self.lifecycle.refusing:
                    headers["Connection"] = "close"
            return send(message)

        with self.lifecycle.open_request():
            try:
                await self.app(scope, receive, send_with_id)
            except ClientGone:
                record.status, record.outcome = CLIENT_CLOSED_REQUEST, "cancelled"
            except Exception as error:
                await _answer_failure(error, record, scope, receive, send_with_id)
            finally:
                self._finish(record, scope, began)

    def _finish(self, record: RequestRecord, scope: Scope, began: float) -> None:
        if record.outcome is None:
            if record.status is None:  # the server was told to stop at once
                record.outcome = "cancelled"
            else:
                record.outcome = "ok" if record.status < 400 else "rejected" if record.status < 500 else "failed"
                record.outcome = "rejected" if record.status in OVERLOADED_STATUSES else record.outcome
        if record.status is not None and record.status >= 400 and record.error_code is not None:
            self.metrics.count_rejected(record.error_code)
        if (route := scope.get("route")) is not None:
            record.route = route.path
        is_quiet = record.route in _QUIET_ROUTES
        if not is_quiet and record.status is not None:
            self.metrics.http.observe(record.route, scope["method"], record.status, awake_seconds() - began)
        level = logging.DEBUG if is_quiet else logging.INFO
        access_logger.log(level, "request", extra={"fields": record.line(scope["method"])})


async def _answer_failure(error: Exception, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
    known = as_api_error(error)
    record.error_code = known.code
    if is_unforeseen(error):
        log_unforeseen(error, record.request_id)
    if record.status is None:
        await known.answer(scope, receive, send)
    else:
        record.outcome = "failed"  # returning with the response unfinished makes uvicorn close the connection


def log_unforeseen(error: BaseException, request_id: str) -> None:
    """Log the stack of an exception that is our bug, without its message, which may quote a prompt."""
    details = {"fields": {"request_id": request_id}}
    logger.error("unforeseen error", exc_info=(type(error), error, error.__traceback__), extra=details)


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return str(given[0], "ascii")
    return secrets.token_hex(16)


class Gate:
    """Refuses a POST before its body is read: when a draining server refuses new work, or when `max_admitted` requests
    are being prepared or in the engine. What ends work always passes. What an operator changes passes when the server
    is full, since it is needed then."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, max_admitted: int) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self.max_admitted = max_admitted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if is_post and (error := self._refusal(scope["path"])) is not None:
            await error.answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, path: str) -> ApiError | None:
        if _ENDS_WORK.fullmatch(path):
            return None
        if self.lifecycle.refusing:
            return draining()
        if self.lifecycle.num_admitted >= self.max_admitted and not _OPERATES.fullmatch(path):
            return overloaded()
        return None
