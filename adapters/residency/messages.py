"""Messages to the residency ledger: plain data, which the event loop sends to the engine's thread."""

from dataclasses import dataclass

from guanaco.models.error_codes import ErrorCode


@dataclass(frozen=True)
class AddVersion:
    """Add an adapter version, which requests may name from now on. The sizes of a known version do not change."""

    version: str
    num_bytes: int  # of host memory
    device_bytes: int = 0  # of the device's arena; 0 if the device has none
    # True: also keep it in host memory from now on. False: add nothing, only stop keeping it. None: change neither.
    is_kept: bool | None = None


@dataclass(frozen=True)
class ForgetVersion:
    """Forget an adapter version: no request will name it any more, unless another `AddVersion` follows."""

    version: str


@dataclass(frozen=True)
class ReadDone:
    """A read that the engine asked for has ended. With an error, the version is not in host memory."""

    version: str
    error: ErrorCode | None = None
