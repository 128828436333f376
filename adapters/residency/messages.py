"""What the ledger of residency is told: plain data, which the event loop sends to the engine's thread."""

from dataclasses import dataclass

from guanaco.models.error_codes import ErrorCode


@dataclass(frozen=True)
class AddVersion:
    """An adapter version that requests may name from now on. The sizes of one that is known stay as they are."""

    version: str
    num_bytes: int  # of host memory
    device_bytes: int = 0  # of the device's arena; 0 where there is none
    # True: it stays in host memory from now on. False: only that ends, and nothing is added. None: as it is.
    is_kept: bool | None = None


@dataclass(frozen=True)
class ForgetVersion:
    """An adapter version that no request will name any more, unless `AddVersion` comes again."""

    version: str


@dataclass(frozen=True)
class ReadDone:
    """A read that the engine asked for has ended; with an error, the version is not in host memory."""

    version: str
    error: ErrorCode | None = None
