"""What happens when nobody uses an adapter version any more: it leaves the registry, then the engine, then the store.

The ledger of holds says when; nothing is polled. Lives on the event loop. Made and used by the adapter manager.
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
        self.tasks: dict[str, asyncio.Task[None]] = {}  # by version, of those that leave
        self._again: set[str] = set()  # of those: freed once more meanwhile
        self._registry = registry
        self._tiers = tiers
        self._sources = sources
        self._engine = engine
        self._waiting: dict[str, asyncio.Future[None]] = {}  # by version: done when it is gone, or published again

    def start(self) -> None:
        """From now on heed the ledger. Before, nothing runs that could use a version."""
        self._registry.holds.on_free = self._pass_on

    async def wait(self, versions: Iterable[str], timeout_seconds: float) -> bool:
        """Wait until versions are gone, or stay for another name; whether they are in time."""
        leaving = [version for version in versions if self._registry.knows(version) or version in self.tasks]
        if not leaving:
            return True
        loop = asyncio.get_running_loop()
        waiting = [self._waiting.setdefault(version, loop.create_future()) for version in leaving]
        _, late = await asyncio.wait(waiting, timeout=timeout_seconds)
        return not late

    def stays(self, version: str) -> None:
        """A version is published: whoever waits for its end need not."""
        waiting = self._waiting.pop(version, None)
        if waiting is not None:
            waiting.set_result(None)

    async def close(self) -> None:
        """Stop what runs."""
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pass_on(self, version: str) -> None:
        """The ledger's news, from any thread."""
        self._engine.on_loop(self._freed, version)

    def _freed(self, version: str) -> None:
        """Nobody uses a version any more, or nobody holds it at all."""
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
            return  # it came back
        await self._sources.collect()

    def _ended(self, version: str) -> None:
        del self.tasks[version]
        self.stays(version)
        if version in self._again:
            self._again.remove(version)
            self._freed(version)
