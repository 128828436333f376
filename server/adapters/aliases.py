"""Changes of aliases while the server runs: point, re-point, split by weight, rename, roll back, remove.

Each change is one step: requests before it get the old targets, requests after it the new ones, whose versions are held
by then. Lives on the event loop; part of the adapter manager.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from guanaco.adapters.errors import AdapterError, alias_not_found
from guanaco.adapters.versions.aliases import Alias, AliasTable, Target, parse_targets
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.sharing import Sharing
from guanaco.server.adapters.sources import AdapterSources
from guanaco.server.adapters.tiers import AdapterTiers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AliasView:
    """What an operator sees of one alias."""

    alias: Alias
    state: str  # "ready"; "degraded": some of its targets are not loaded; "dangling": none of them is
    versions: Mapping[str, str | None]  # target → its current version; None: not loaded, or itself an alias
    num_uses: int  # requests since the start
    last_used: float | None  # seconds since the epoch

    def public(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.alias.name,
            "state": self.state,
            **self.alias.now.public(),
            "versions": dict(self.versions),
            "num_uses": self.num_uses,
            "last_used": self.last_used,
            "history": [past.public() for past in self.alias.history],
        }


class AliasManager:
    """All changes of one alias table. A coroutine raises AdapterError for a change that is refused; then nothing has
    changed."""

    def __init__(
        self,
        table: AliasTable,
        registry: AdapterRegistry,
        sources: AdapterSources,
        tiers: AdapterTiers,
        sharing: Sharing,
        *,
        save: Callable[[], Awaitable[None]],
    ) -> None:
        """save: writes aliases and names to the registry's file."""
        self.table = table
        self._registry = registry
        self._sources = sources
        self._tiers = tiers
        self._sharing = sharing
        self._save = save
        self._lock = asyncio.Lock()  # changes happen one after the other

    async def put(self, name: str, split: Mapping[str, int], *, expected_revision: int | None = None) -> Alias:
        """Make `name` lead to the targets of `split`; see `parse_targets`. expected_revision: refuse the change unless
        the alias is at this revision."""
        async with self._changing(parse_targets(split)) as targets:
            return self.table.put(name, targets, now=time.time(), expected=expected_revision)

    async def rollback(self, name: str, revision: int | None = None) -> Alias:
        """Give an alias the targets that it had before its last change, or at an earlier revision. This is a new
        revision, as any change is."""
        await self._sharing.sync()
        alias = self._found(name)
        if not alias.history:
            raise AdapterError(ErrorCode.NO_HISTORY, f"{name} has led nowhere else before", "name")
        wanted = alias.history[-1].number if revision is None else revision
        past = next((past for past in alias.history if past.number == wanted), None)
        if past is None:
            raise AdapterError(ErrorCode.REVISION_MISSING, f"{name} has no such revision in its history", "revision")
        async with self._changing(past.targets) as targets:
            return self.table.put(name, targets, now=time.time(), expected=alias.now.number)

    async def rename(self, name: str, new: str) -> Alias:
        """Rename an alias. Other aliases that lead to it follow."""
        async with self._changing():
            return self.table.rename(name, new)

    async def remove(self, name: str) -> Alias:
        """Remove an alias. Requests that named it go on."""
        async with self._changing():
            return self.table.remove(name)

    def view(self, name: str) -> AliasView | None:
        alias = self.table.get(name)
        return None if alias is None else self._view(alias)

    def views(self) -> tuple[AliasView, ...]:
        return tuple(self._view(alias) for alias in self.table.all())

    async def refresh(self) -> None:
        """Hold the versions to which aliases lead now. Called when names were loaded or removed."""
        self.table.refresh()
        for version in self.table.pinned() - self._registry.versions():
            try:
                async with self._held(version):
                    pass
            except AdapterError as error:
                logger.warning("an alias leads to version %s, which could not be read: %s", version[:12], error)

    @asynccontextmanager
    async def _changing(self, targets: tuple[Target, ...] = ()) -> AsyncIterator[tuple[Target, ...]]:
        """Run a change of the table, alone, and then save. It is undone if a shared list can't be written.

        Yields the targets with their whole versions, which the registry knows and holds meanwhile.
        """
        async with self._lock, self._sharing.changing() as change:
            before = self.table.all()
            async with AsyncExitStack() as stack:
                whole = []
                for target in targets:
                    if target.version is not None:
                        version = self._whole_version(target.name, target.version)
                        target = replace(target, version=version)
                        await stack.enter_async_context(self._held(version))
                    whole.append(target)
                yield tuple(whole)
                try:
                    await change.set_aliases(self.table.all())
                except AdapterError:
                    self.table.restore(before)
                    raise
            await self._save()

    def _whole_version(self, name: str, prefix: str) -> str:
        entry = self._registry.resolve(name)
        if entry is None:
            kind = ErrorCode.BAD_TARGET if self.table.get(name) is not None else ErrorCode.TARGET_NOT_FOUND
            raise AdapterError(kind, f"{name} is no loaded adapter: only those have versions", "split")
        known = {entry.version, *entry.history}
        known |= {v for alias in self.table.all() for v in alias.versions_of(name)}
        matching = [version for version in known if version.startswith(prefix)]
        if len(matching) != 1:
            problem = f"{name} has had no version {prefix}, or several that begin so; see its history"
            raise AdapterError(ErrorCode.VERSION_MISSING, problem, "split")
        return matching[0]

    @asynccontextmanager
    async def _held(self, version: str) -> AsyncIterator[None]:
        """Hold a version as a load does; it is read from the store if the registry does not know it."""
        is_known = self._registry.hold(version, Holder.LOAD)
        try:
            if not is_known:
                adapter = await self._sources.stored(version)
                self._registry.stage(adapter)
                try:
                    await self._tiers.register(adapter)
                    self.table.regain(version)
                finally:
                    self._registry.unstage(version)
            yield
        finally:
            self._registry.holds.give_back(version, Holder.LOAD)

    def _found(self, name: str) -> Alias:
        alias = self.table.get(name)
        if alias is None:
            raise alias_not_found()
        return alias

    def _view(self, alias: Alias) -> AliasView:
        loaded = [self._registry.resolve(t.name, t.version) is not None for t in self.table.leads_to(alias.name)]
        entries = {target.text: self._registry.resolve(target.name, target.version) for target in alias.now.targets}
        return AliasView(
            alias,
            state="ready" if all(loaded) else "degraded" if any(loaded) else "dangling",
            versions={text: None if entry is None else entry.version for text, entry in entries.items()},
            num_uses=self._registry.usage(alias.name)[0],
            last_used=self._registry.usage(alias.name)[1],
        )
