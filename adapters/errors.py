"""Everything that can be wrong with an adapter. `code` is stable and machine-readable; the message names the field or
tensor."""

from enum import Enum

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import OperatorError


class ErrorKind(Enum):
    """The party that can fix a refusal. The HTTP status follows from the kind."""

    CALLER = "caller"  # the request or the adapter is wrong until its author changes it
    MISSING = "missing"  # as CALLER: the thing that the request names does not exist
    FORBIDDEN = "forbidden"  # as CALLER: the hub denies this server access to it
    CONFLICT = "conflict"  # the request contradicts the present state
    CAPACITY = "capacity"  # there is no memory for it beside the adapters in use
    UPSTREAM = "upstream"  # the hub failed; the same request may work later
    PASSING = "passing"  # this server could not do it now; the same request may work later
    STORAGE = "storage"  # this server's disk can't store it
    OURS = "ours"  # this server's own copy is damaged

    @property
    def is_failure(self) -> bool:
        """Whether the fault lies with the server, its disk or the hub, and so says nothing about the adapter."""
        return self in (ErrorKind.UPSTREAM, ErrorKind.PASSING, ErrorKind.STORAGE, ErrorKind.OURS)


# Codes that are not listed here are of kind CALLER.
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
    ErrorCode.REGISTRY_BUSY: ErrorKind.PASSING,
    ErrorCode.REGISTRY_FAILED: ErrorKind.STORAGE,
    ErrorCode.STORE_FAILED: ErrorKind.STORAGE,
    ErrorCode.VERSION_DAMAGED: ErrorKind.OURS,
}


class AdapterError(OperatorError):
    """A refused adapter: its code, the kind that follows from it, and the config field or tensor at fault."""

    def __init__(self, code: ErrorCode, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.kind = _KINDS.get(code, ErrorKind.CALLER)
        self.field = field


def adapter_not_found() -> AdapterError:
    """The error for a name that no adapter has."""
    return AdapterError(ErrorCode.ADAPTER_NOT_FOUND, "no adapter has this name; GET /v1/adapters lists them", "name")


def alias_not_found() -> AdapterError:
    """The error for a name that no alias has."""
    return AdapterError(ErrorCode.ALIAS_NOT_FOUND, "no alias has this name; GET /v1/aliases lists them", "name")
