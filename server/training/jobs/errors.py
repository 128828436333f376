"""Refusals of the training API. Each has a stable code, a message that says what to do, and the field at fault."""

import re
from collections.abc import Iterable
from enum import Enum

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError

# Paths in the message of a trainer or a library. In quotes a path may hold spaces; elsewhere it ends at one. A slash
# after a letter, a digit, a dot, a colon or a slash belongs to an address, a fraction or `and/or`, so it is no path.
_PATHS = re.compile(
    r"""(?P<quote>['"`])(?:file:)?~?/[^'"`\n]*(?P=quote)"""
    r"""|\bfile:/+[^\s'"`,;)\]}>]*"""
    r"""|(?<![\w.:/~])~?/[\w.@+~%-][^\s'"`,;:()\]}>]*"""
)
_HIDDEN = "(a file of the server)"


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """A text for a client, without the server's paths. known: paths to hide even if they hold spaces."""
    for path in sorted(filter(None, known), key=len, reverse=True):
        text = re.sub(re.escape(path) + r"(?:/[^\s'\"`,;:()\]}>]*)?", _HIDDEN, text)
    return _PATHS.sub(_HIDDEN, text)


class RefusalKind(Enum):
    """The sort of a refusal. The HTTP status follows from it."""

    CALLER = "caller"  # the request is wrong
    MISSING = "missing"  # the key has no such file or job
    CONFLICT = "conflict"  # the request contradicts the present state
    QUOTA = "quota"  # the key has used up a limit
    TOO_LARGE = "too large"  # the body is too large
    STORAGE = "storage"  # the disk cannot take it


class RequestRefused(GuanacoError):
    """A refused request. It changed nothing."""

    def __init__(
        self, code: ErrorCode, message: str, param: str | None = None, kind: RefusalKind = RefusalKind.CALLER
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.kind = kind


def file_not_found(param: str | None = None) -> RequestRefused:
    """The error for a file that is not there, or that another key uploaded."""
    text = "this API key has no file of that id; GET /v1/files lists its files"
    return RequestRefused(ErrorCode.FILE_NOT_FOUND, text, param, RefusalKind.MISSING)


def job_not_found() -> RequestRefused:
    """The error for a job that is not there, or that another key created."""
    text = "this API key has no fine-tuning job of that id; GET /v1/fine_tuning/jobs lists its jobs"
    return RequestRefused(ErrorCode.JOB_NOT_FOUND, text, None, RefusalKind.MISSING)


def quota(message: str, param: str | None = None) -> RequestRefused:
    """The error for a key that has used up one of its limits."""
    return RequestRefused(ErrorCode.TRAINING_QUOTA_EXCEEDED, message, param, RefusalKind.QUOTA)


def storage_failed(error: OSError) -> RequestRefused:
    """The error if the disk can't store an upload or a record. It shows no path."""
    text = f"the server's disk could not take it ({error.strerror or 'unknown error'}); its operator must make room"
    return RequestRefused(ErrorCode.STORE_FAILED, text, None, RefusalKind.STORAGE)
