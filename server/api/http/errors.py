"""HTTP errors: one exception, one table from exception types to HTTP answers, one JSON shape.

Messages are fixed texts of ours. They never hold the client's text, a path, or the text of an unforeseen exception.
Used by every route, by the middleware, and by the protocol class for failures before there is a request.
"""

import math
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.server.api.http.access_log import record_of
from guanaco.server.api.http.error_paths import anthropic_envelope, anthropic_status, is_anthropic, not_served
from guanaco.server.engine.async_engine import EngineOverloaded, EngineUnavailable

_TYPES = {429: "rate_limit_error"}  # besides these: 4xx invalid_request_error, 5xx server_error
CLIENT_CLOSED_REQUEST = 499  # nginx's number, for the log only: nobody is there to read it


class ApiError(GuanacoError):
    """An error as the client gets it: status, code and message. param: the field at fault. retry_after: in seconds."""

    def __init__(
        self, status: int, code: ErrorCode, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def envelope(self) -> dict[str, Any]:
        """OpenAI's shape: {"error": {message, type, param, code}}."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def on_path(self, path: str, request_id: str | None) -> tuple[int, bytes]:
        """Status and body for a request to `path`, in the shape that the path's clients expect."""
        if not is_anthropic(path):
            return self.status, orjson.dumps(self.envelope())
        envelope = anthropic_envelope(self.status, self.code, self.message, self.param, request_id)
        return anthropic_status(self.status, self.code), orjson.dumps(envelope)

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self, scope: Scope) -> Response:
        """The answer to the request of `scope`. Also writes the code into the request's record."""
        record = record_of(scope)
        record.error_code = self.code
        status, body = self.on_path(scope["path"], record.request_id)
        return Response(body, status, self.headers(), "application/json")

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer from within the chain of ASGI applications."""
        await self.response(scope)(scope, receive, send)


class ClientGone(GuanacoError):
    """The client left before its answer was complete, so nobody gets an error."""


class GenerationFailed(GuanacoError):
    """The engine ended a request without finishing it. `reason` is the engine's error code."""

    def __init__(self, reason: ErrorCode) -> None:
        super().__init__(reason)
        self.reason = reason


class DeadlineExceeded(GuanacoError):
    """A request took longer than `request_timeout`."""


def bad_request(message: str, param: str | None = None, code: ErrorCode = ErrorCode.INVALID_VALUE) -> ApiError:
    return ApiError(400, code, message, param=param)


def model_not_found() -> ApiError:
    return ApiError(
        404, ErrorCode.MODEL_NOT_FOUND, "no model of that name is served; GET /v1/models lists them", param="model"
    )


def alias_target_missing() -> ApiError:
    text = "this name is an alias, and what it leads to is not loaded: its operator must load that, or re-point it"
    return ApiError(404, ErrorCode.ALIAS_TARGET_MISSING, text, param="model")


def draining(retry_after: float = 5.0) -> ApiError:
    return ApiError(
        503, ErrorCode.SERVER_DRAINING, "this server is shutting down; try another one", retry_after=retry_after
    )


def overloaded(retry_after: float = 1.0) -> ApiError:
    text = "too many requests are waiting; try again later"
    return ApiError(503, ErrorCode.SERVER_OVERLOADED, text, retry_after=retry_after)


def _unavailable(error: EngineUnavailable) -> ApiError:
    if error.draining:
        return draining()
    return ApiError(
        503, ErrorCode.ENGINE_UNAVAILABLE, "the engine does not run; the server must be restarted", retry_after=10
    )


def _http(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, ErrorCode.NOT_FOUND, "there is no such route; GET /openapi.json lists them")
    if error.status_code == 405:
        return ApiError(405, ErrorCode.METHOD_NOT_ALLOWED, "this route doesn't answer this method")
    return ApiError(error.status_code, ErrorCode.HTTP_ERROR, "the request could not be served")


# The engine's error code → the client's error.
_FAILURES = {
    ErrorCode.QUEUE_TIMEOUT: ApiError(
        503, ErrorCode.QUEUE_TIMEOUT, "the request waited too long for its turn; try again later", retry_after=5
    ),
    ErrorCode.SERVER_SHUTTING_DOWN: ApiError(
        503, ErrorCode.SERVER_SHUTTING_DOWN, "the server was shut down before the end of the answer"
    ),
    ErrorCode.ENGINE_DEAD: ApiError(
        500, ErrorCode.ENGINE_UNAVAILABLE, "the engine failed before the answer was complete"
    ),
    ErrorCode.ADAPTER_LOAD_FAILED: ApiError(
        500, ErrorCode.ADAPTER_LOAD_FAILED, "the adapter could not be brought to the device"
    ),
    ErrorCode.ADAPTER_TIMEOUT: ApiError(
        503,
        ErrorCode.ADAPTER_TIMEOUT,
        "the adapter could not be read into memory in time; try again later",
        retry_after=5,
    ),
    ErrorCode.ADAPTER_READ_FAILED: ApiError(
        503, ErrorCode.ADAPTER_READ_FAILED, "the adapter could not be read into memory; try again later", retry_after=5
    ),
    ErrorCode.ADAPTER_BROKEN: ApiError(
        500, ErrorCode.ADAPTER_BROKEN, "the server's copy of the adapter is damaged or gone"
    ),
    ErrorCode.ADAPTER_UNLOADED: ApiError(
        503, ErrorCode.ADAPTER_UNLOADED, "the adapter was removed before the answer was complete"
    ),
    ErrorCode.NUMERICAL_ERROR: ApiError(
        500, ErrorCode.NUMERICAL_ERROR, "the model produced values that are not numbers"
    ),
    ErrorCode.GRAMMAR_TOO_COMPLEX: ApiError(
        400,
        ErrorCode.GRAMMAR_TOO_COMPLEX,
        "the grammar of the answer became too complex for this server: simplify it",
    ),
    ErrorCode.GRAMMAR_STUCK: ApiError(
        400,
        ErrorCode.GRAMMAR_STUCK,
        "the grammar of the answer came to a place where this model has no token that may follow",
    ),
}
_OUT_OF_MEMORY = ApiError(
    503, ErrorCode.OUT_OF_MEMORY, "the server has no memory for this request; ask for less at once", retry_after=5
)
_INTERNAL = ApiError(
    500, ErrorCode.INTERNAL_ERROR, "the server failed; its log has the details under this request's id"
)


def as_api_error(error: BaseException) -> ApiError:
    """The HTTP error for an exception. An exception that is not listed here is our bug, and becomes a 500."""
    match error:
        case ApiError():
            return error
        case EngineOverloaded():
            return overloaded(error.retry_after_seconds)
        case EngineUnavailable():
            return _unavailable(error)
        case GenerationFailed():
            return _FAILURES.get(error.reason, _INTERNAL)
        case MemoryError():
            return _OUT_OF_MEMORY
        case DeadlineExceeded():
            return ApiError(504, ErrorCode.REQUEST_TIMEOUT, "the request took longer than this server allows")
        case RequestValidationError():  # FastAPI's own handler would quote the input
            return bad_request("the request is not valid")
        case HTTPException():
            return _http(error)
        case _:
            return _INTERNAL


# The exceptions listed there; `app` registers `handle_error` for each. `middleware` answers and logs MemoryError.
HANDLED: tuple[type[Exception], ...] = (
    ApiError,
    EngineOverloaded,
    EngineUnavailable,
    GenerationFailed,
    DeadlineExceeded,
    HTTPException,
    RequestValidationError,
)


def is_unforeseen(error: BaseException) -> bool:
    """Whether the stack of this error goes into the log."""
    return as_api_error(error) in (_INTERNAL, _OUT_OF_MEMORY)


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for the exceptions in HANDLED."""
    known = as_api_error(error)
    served = getattr(request.app.state, "served_families", ())
    if known.code is ErrorCode.NOT_FOUND and (text := not_served(request.scope["path"], served)) is not None:
        known = ApiError(404, ErrorCode.ROUTE_NOT_SERVED, text)
    response = known.response(request.scope)
    if isinstance(error, HTTPException):
        response.headers.update({k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"})
    return response
