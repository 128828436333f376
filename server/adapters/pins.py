"""Adapters that an operator keeps in host memory: by name, whatever version the name stands for.

This module keeps the names; the engine's ledger of residency keeps the versions in memory. Runs on the event loop.
Called by the adapter manager.
"""

import logging
from collections.abc import Iterable

from guanaco.adapters.errors import AdapterError, adapter_not_found
from guanaco.adapters.residency.messages import AddVersion
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.registry import AdapterEntry, AdapterRegistry
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.records import AdapterRecords
from guanaco.server.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

_PARTY = "pinned"  # its name in the ledger of holds, and in the file that a restart reads


class AdapterPins:
    """The pinned names of one registry. A name keeps its pin when it comes to stand for another version."""

    def __init__(self, registry: AdapterRegistry, engine: AsyncEngine) -> None:
        self.names: set[str] = set()
        self._registry = registry
        self._engine = engine

    def saved(self) -> dict[str, frozenset[str]]:
        """The names that `AdapterRecords.save` must write to the registry's file."""
        return {_PARTY: frozenset(self.names)}

    def restore(self, records: AdapterRecords) -> tuple[str, ...]:
        """Pin the names that were pinned before a restart. Returns notes for the operator. Called before the engine
        starts."""
        self.names = set(records.names(_PARTY))
        pinned = self._pinned()
        self._hold({entry.version for entry in pinned})
        wanted = (AddVersion(entry.version, entry.num_bytes, is_kept=True) for entry in pinned)
        return tuple(
            f"adapter {entry.name} is pinned, and there is no room to keep it in memory"
            for entry, has_room in zip(pinned, self._engine.keep_from_start(*wanted), strict=True)
            if not has_room
        )

    async def pin(self, name: str) -> None:
        """Keep an adapter in host memory. Raises AdapterError if the name is unknown, or if there is no room."""
        if self._registry.resolve(name) is None:
            raise adapter_not_found()
        was_pinned = name in self.names
        self.names.add(name)
        if not await self._tell_engine() and not was_pinned:
            self.names.discard(name)
            await self._tell_engine()
            problem = "there is no room to keep it: unpin or unload another, or raise --adapter-host-memory"
            raise AdapterError(ErrorCode.HOST_MEMORY_FULL, problem)

    async def unpin(self, name: str) -> None:
        """Let an adapter be evicted again. Does nothing for a name that is not pinned."""
        self.names.discard(name)
        await self._tell_engine()

    async def refresh(self) -> None:
        """Move pins to the versions that the names stand for now. Called when names have changed."""
        if (self.names or self._kept()) and not await self._tell_engine():
            logger.warning("some pinned adapters find no room in memory; they are read when a request needs them")

    async def _tell_engine(self) -> bool:
        """Send the engine all pins, since one that was refused before may find room now. Returns whether all found
        room."""
        wanted = {entry.version: entry for entry in self._pinned()}
        released = [AddVersion(version, 0, is_kept=False) for version in self._kept() - wanted.keys()]
        kept = [AddVersion(version, entry.num_bytes, is_kept=True) for version, entry in sorted(wanted.items())]
        self._hold(wanted.keys())
        return await self._engine.add_versions(*released, *kept)

    def _kept(self) -> frozenset[str]:
        """The versions that the engine was told to keep."""
        return self._registry.holds.assigned(_PARTY, Holder.OPERATOR)

    def _hold(self, versions: Iterable[str]) -> None:
        self._registry.holds.assign(_PARTY, {Holder.OPERATOR: versions})

    def _pinned(self) -> list[AdapterEntry]:
        return [entry for entry in self._registry.entries() if entry.name in self.names]
