"""What can be wrong with an adapter. `code` is stable and machine-readable; the message names the field or tensor."""

from enum import Enum

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import OperatorError


class ErrorKind(Enum):
    """Who can do something about a refusal. The HTTP status follows from the kind."""

    CALLER = "caller"  # the request or the adapter is wrong, and stays wrong until somebody changes it
    MISSING = "missing"  # as CALLER: what the request names is not there
    FORBIDDEN = "forbidden"  # as CALLER: the hub does not let this server have it
    CONFLICT = "conflict"  # the request does not fit what is there now
    CAPACITY = "capacity"  # there is no memory for it beside the adapters that are in use
    UPSTREAM = "upstream"  # the hub failed; the same request may work later
    PASSING = "passing"  # this server could not do it now; the same request may work later
    STORAGE = "storage"  # this server's disk does not take it
    OURS = "ours"  # this server's own copy is damaged

    @property
    def is_failure(self) -> bool:
        """Whether it says nothing about the adapter: the server, its disk or the hub failed."""
        return self in (ErrorKind.UPSTREAM, ErrorKind.PASSING, ErrorKind.STORAGE, ErrorKind.OURS)


# Codes that are not listed are of kind CALLER.
_KINDS = {
    ErrorCode.ADAPTER_NOT_FOUND: ErrorKind.MISSING,
    ErrorCode.ALIAS_NOT_FOUND: ErrorKind.MISSING,
    ErrorCode.HUB_NOT_FOUND: ErrorKind.MISSING,
    ErrorCode.NOT_FOUND: ErrorKind.MISSING,
    ErrorCode.REVISION_MISSING: ErrorKind.MISSING,
    ErrorCode.TARGET_NOT_FOUND: ErrorKind.MISSING,
    ErrorCode.VERSION_MISSING: ErrorKind.MISSING,
    ErrorCode.HUB_FORBIDDEN: ErrorKind.FORBIDDEN,
    ErrorCode.ALIAS_CYCLE: ErrorKind.CONFLICT,
    ErrorCode.CHANGED_WHILE_READING: ErrorKind.CONFLICT,
    ErrorCode.NAME_TAKEN: ErrorKind.CONFLICT,
    ErrorCode.NO_HISTORY: ErrorKind.CONFLICT,
    ErrorCode.REVISION_CONFLICT: ErrorKind.CONFLICT,
    ErrorCode.TOO_MANY_ALIASES: ErrorKind.CONFLICT,
    ErrorCode.VERSION_CONFLICT: ErrorKind.CONFLICT,
    ErrorCode.DEVICE_MEMORY_FULL: ErrorKind.CAPACITY,
    ErrorCode.HOST_MEMORY_FULL: ErrorKind.CAPACITY,
    ErrorCode.HUB_FAILED: ErrorKind.UPSTREAM,
    ErrorCode.HUB_OFFLINE: ErrorKind.PASSING,
    ErrorCode.PROBE_FAILED: ErrorKind.PASSING,
    ErrorCode.STORE_FAILED: ErrorKind.STORAGE,
    ErrorCode.VERSION_DAMAGED: ErrorKind.OURS,
}


class AdapterError(OperatorError):
    """A refused adapter: its code, its kind (which follows from the code), and the config field or tensor at fault."""

    def __init__(self, code: ErrorCode, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.kind = _KINDS.get(code, ErrorKind.CALLER)
        self.field = field


def adapter_not_found() -> AdapterError:
    """The refusal of a name that no adapter has."""
    return AdapterError(ErrorCode.ADAPTER_NOT_FOUND, "no adapter is called so; GET /v1/adapters lists them", "name")


def alias_not_found() -> AdapterError:
    """The refusal of a name that no alias has."""
    return AdapterError(ErrorCode.ALIAS_NOT_FOUND, "no alias is called so; GET /v1/aliases lists them", "name")
