"""Retires adapter versions that nothing uses any more: they leave the registry, then the engine, then the store.

The ledger of holds reports each version that nothing holds; nothing is polled. Lives on the event loop. Made and used
by the adapter manager.
"""

import asyncio
from collections.abc import Iterable

from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.server.adapters.sources import AdapterSources
from guanaco.server.adapters.tiers import AdapterTiers
from guanaco.server.engine.async_engine import AsyncEngine


class Retirement:
    """Retires the versions of one registry, from `start` on."""

    def __init__(
        self, registry: AdapterRegistry, tiers: AdapterTiers, sources: AdapterSources, engine: AsyncEngine
    ) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}  # by version: the task that retires it
        self._again: set[str] = set()  # versions in `tasks` that were freed once more meanwhile
        self._registry = registry
        self._tiers = tiers
        self._sources = sources
        self._engine = engine
        self._waiting: dict[str, asyncio.Future[None]] = {}  # by version: done when that is gone, or published again

    def start(self) -> None:
        """Retire versions from now on. Before that, nothing runs that could use a version."""
        self._registry.holds.on_free = self._pass_on

    async def wait(self, versions: Iterable[str], timeout_seconds: float) -> bool:
        """Wait until each version is gone or was published again. Returns False if that takes too long."""
        leaving = [version for version in versions if self._registry.knows(version) or version in self.tasks]
        if not leaving:
            return True
        loop = asyncio.get_running_loop()
        waiting = [self._waiting.setdefault(version, loop.create_future()) for version in leaving]
        _, late = await asyncio.wait(waiting, timeout=timeout_seconds)
        return not late

    def stays(self, version: str) -> None:
        """Let `wait` no longer wait for a version, since it was published again."""
        waiting = self._waiting.pop(version, None)
        if waiting is not None:
            waiting.set_result(None)

    async def close(self) -> None:
        """Stop the tasks."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pass_on(self, version: str) -> None:
        """Pass a version that the ledger reports as free on to the event loop. Called on any thread."""
        self._engine.on_loop(self._freed, version)

    def _freed(self, version: str) -> None:
        """Begin to retire a version, unless it is used again. If the registry doesn't know it, only its stored copy is
        removed."""
        if version in self.tasks:
            self._again.add(version)
            return
        if self._registry.drop(version):
            self._begin(version, is_known=True)
        elif not self._registry.holds.is_held(version):
            self._begin(version, is_known=False)

    def _begin(self, version: str, *, is_known: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._retire(version, is_known=is_known))
        self.tasks[version] = task
        task.add_done_callback(lambda _: self._ended(version))

    async def _retire(self, version: str, *, is_known: bool) -> None:
        if is_known and not await self._tiers.forget(version):
            return  # it was loaded again
        await self._sources.collect()

    def _ended(self, version: str) -> None:
        del self.tasks[version]
        self.stays(version)
        if version in self._again:
            self._again.remove(version)
            self._freed(version)
