"""What must be done for the ledgers of residency to be true: plain data, made in the order in which it is listed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Read:
    """Read a version from disk into host memory."""

    version: str


@dataclass(frozen=True)
class Copy:
    """Copy a version from host memory into an adapter slot of the device."""

    version: str
    slot: int


@dataclass(frozen=True)
class Evict:
    """Let a version go: from an adapter slot, from host memory, or from both."""

    version: str
    slot: int | None = None  # to empty; None: it is in none
    from_host: bool = False
    is_forgotten: bool = False  # the version exists no more, as somebody asked for


Move = Read | Copy | Evict
Moves = tuple[Move, ...]
