"""Error bodies by path: Anthropic's shape on Anthropic's routes, OpenAI's on all others; and the text for a missing
route.

The path decides because keys, limits and the parser can fail before a route is known. Pure functions over plain values;
`errors` calls them.
"""

from collections.abc import Container, Mapping
from typing import Any

from guanaco.models.error_codes import ErrorCode

ANTHROPIC_PATH = "/v1/messages"

_OVERLOADED_STATUS = 529  # Anthropic's status for an overloaded server, in place of 503
OVERLOADED_STATUSES = frozenset((503, _OVERLOADED_STATUS))
_OVERLOADED_CODES = frozenset((ErrorCode.SERVER_OVERLOADED, ErrorCode.QUEUE_TIMEOUT, ErrorCode.TOO_MANY_CONNECTIONS))
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    _OVERLOADED_STATUS: "overloaded_error",
}  # besides these: 4xx invalid_request_error, 5xx api_error

SERVED = "POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /tokenize and GET /v1/models"
# The first part of a path, without `/v1` → the start of the sentence that says that it is not served.
NOT_SERVED: Mapping[str, str] = {
    "assistants": "assistants are",
    "audio": "audio is",
    "batches": "batches are",
    "containers": "containers are",
    "conversations": "stored conversations are",
    "embeddings": "embeddings are",
    "evals": "evals are",
    "files": "files are",
    "fine_tuning": "fine-tuning jobs are",
    "images": "images are",
    "moderations": "moderations are",
    "organization": "the management of organizations is",
    "realtime": "realtime sessions are",
    "rerank": "reranking is",
    "score": "scoring is",
    "threads": "threads are",
    "uploads": "uploads are",
    "vector_stores": "vector stores are",
    "videos": "videos are",
}


def is_anthropic(path: str) -> bool:
    """Whether a path is one of Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")


def anthropic_status(status: int, code: ErrorCode) -> int:
    """Anthropic's status for one of our errors."""
    return _OVERLOADED_STATUS if status == 503 and code in _OVERLOADED_CODES else status


def anthropic_envelope(
    status: int, code: ErrorCode, message: str, param: str | None, request_id: str | None
) -> dict[str, Any]:
    """Anthropic's shape: {"type": "error", "error": {type, message, details}, "request_id"}.

    `details` has our code as `error_code`. If the message doesn't name the field, the field's name is added."""
    kind = _ANTHROPIC_TYPES.get(
        anthropic_status(status, code), "invalid_request_error" if status < 500 else "api_error"
    )
    text = message if param is None or param in message else f"{param}: {message}"
    details = {"error_code": code, "param": param}
    return {"type": "error", "error": {"type": kind, "message": text, "details": details}, "request_id": request_id}


def not_served(path: str, served: Container[str] = ()) -> str | None:
    """The message for one of OpenAI's paths that this server doesn't have; None for any other path, and for
    those of the families `served`."""
    family = path.removeprefix("/v1").removeprefix("/").partition("/")[0]
    what = NOT_SERVED.get(family)
    if family in served or what is None:
        return None
    return f"{what} not served here: this server generates text with {SERVED}"
