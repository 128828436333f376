"""Moves of adapter versions that the ledgers of residency have decided: plain data, to be carried out in order."""

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
    """Remove a version from an adapter slot, from host memory, or from both."""

    version: str
    slot: int | None = None  # the slot to empty; None: it is in none
    from_host: bool = False
    is_forgotten: bool = False  # a `ForgetVersion` is complete: the engine no longer knows the version


Move = Read | Copy | Evict
Moves = tuple[Move, ...]
