"""Adapters that come and go while the engine runs: load, prove, publish, replace, roll back, drain, remove.

Lives on the event loop; reading, copying and hashing happen on the threads of `sources`, and the proof of effect in
background requests, so a load delays nobody but its caller. Knows no HTTP. Used by the admin routes and by training.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from guanaco.adapters.errors import AdapterError, adapter_not_found
from guanaco.adapters.peft.weights import LoadedAdapter
from guanaco.adapters.versions.aliases import AliasTable
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.names import check_name
from guanaco.adapters.versions.profile import FROM_FILE, KEPT, Profile
from guanaco.adapters.versions.registry import AdapterEntry, AdapterRegistry, BrokenEntry
from guanaco.adapters.versions.registry_file import RegistryFile, Saved
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.adapters.versions.store import OnStage, VersionStore
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.aliases import AliasManager
from guanaco.server.adapters.following import ListFollower
from guanaco.server.adapters.pins import AdapterPins
from guanaco.server.adapters.probe import EffectProbe
from guanaco.server.adapters.records import AdapterRecords
from guanaco.server.adapters.retirement import Retirement
from guanaco.server.adapters.sharing import Sharing
from guanaco.server.adapters.sources import ROLLED_BACK, AdapterPolicy, AdapterSources, LoadRequest, kept_profile
from guanaco.server.adapters.tiers import AdapterTiers
from guanaco.server.adapters.view import AdapterView, LoadingEntry
from guanaco.server.engine.async_engine import AsyncEngine


class AdapterManager:
    """All changes of one registry. A coroutine raises AdapterError for a change that is refused; then nothing has
    changed."""

    def __init__(
        self,
        registry: AdapterRegistry,
        store: VersionStore,
        saved: RegistryFile,
        engine: AsyncEngine,
        policy: AdapterPolicy,
        *,
        probe_token_ids: tuple[int, ...],
        on_change: Callable[[], None] = lambda: None,
        on_load: Callable[[str, float], None] = lambda *_: None,
        on_stage: OnStage = lambda *_: None,
        device_bytes: Callable[[LoadedAdapter], int] = lambda _: 0,
        shared: SharedRegistry | None = None,
    ) -> None:
        """shared: the list and versions of adapters that this server has in common with others.

        on_change: called when names have changed.

        on_load: called when a load has ended, with "ok", "refused" or "failed" and its seconds. on_stage: called on any
        thread with the name and the seconds of each part of a load. device_bytes: as in `AdapterTiers`.
        """
        self.registry = registry
        self._sources = AdapterSources(registry, store, policy, on_stage, shared)
        table = AliasTable(registry)
        self._records = AdapterRecords(registry, table, saved)
        self._engine = engine
        self.tiers = AdapterTiers(registry, store, engine, self._broke, device_bytes)
        self._pins = AdapterPins(registry, engine)
        self._probe = EffectProbe(engine, probe_token_ids, on_stage)
        self._on_change = on_change
        self._on_load = on_load
        self._on_stage = on_stage
        self._locks: dict[str, asyncio.Lock] = {}  # by name: its changes happen one after the other
        self._lock_users: Counter[str] = Counter()  # by name: how many hold or wait for its lock
        self._num_loads: Counter[str] = Counter()  # by name, since the start
        self._loads: dict[LoadRequest, asyncio.Task[AdapterEntry]] = {}
        self._retirement = Retirement(registry, self.tiers, self._sources, engine)
        follower = ListFollower(
            registry,
            table,
            self._sources,
            self.tiers,
            self._records,
            on_publish=self._retirement.stays,
            forget=self._forget,
        )
        self.sharing = Sharing(shared, follower, settle=self._settle)
        self.aliases = AliasManager(table, registry, self._sources, self.tiers, self.sharing, save=self._changed)

    def start(self) -> None:
        """Follow the shared list, if there is one. Called once, when the engine runs."""
        self.sharing.start()

    def restore(self) -> tuple[str, ...]:
        """Bring back the adapters that were loaded before a restart. Returns notes for the operator. Called once,
        before the engine runs."""
        for entry in self.registry.entries():  # adapters of --adapter, which are in no store
            self.tiers.adopt(self.registry.host_copy(entry.version), is_permanent=True)
        notes = self._records.adopt(self.sharing.read_now, self._pins.saved())
        notes += self._records.restore(self._sources.stored_now, self._sources.profile, self.tiers.adopt)
        notes += self._pins.restore(self._records)
        self._sources.collect_now()
        self._retirement.start()
        return notes

    async def load(self, wanted: LoadRequest) -> AdapterEntry:
        """Read, check, prove and publish an adapter.

        When it returns, new requests get the new version; running requests keep theirs. Two equal loads at the same
        time are done once.
        """
        running = self._loads.get(wanted)
        if running is None:
            running = asyncio.create_task(self._timed(self._load_locked(wanted)))
            self._loads[wanted] = running
            running.add_done_callback(lambda task: self._load_ended(wanted, task))
        # A client that leaves does not stop a load that others may wait for.
        return await asyncio.shield(running)

    async def is_same(self, name: str, source: str) -> bool:
        """Whether loading `source` as `name` would change nothing, as `name` has that content and profile already.
        Reads the whole source. Raises AdapterError as `load` does."""
        async with self._locked(name):
            located = await self._sources.locate(source)
            profile, _ = await self._sources.profile_for(name, located, None, self._listed(name))
            adapter = await self._sources.ingest(name, located, keep=False)
            entry = self.registry.resolve(name)
        return entry is not None and entry.version == adapter.version and entry.profile == profile

    async def unload(self, name: str, *, force: bool = False, timeout_seconds: float = 0.0) -> bool:
        """Remove `name`. Running requests go on. With `force` they end with an error, unless another name or an alias
        still leads to their version.

        Waits up to `timeout_seconds` until the version is gone, and returns whether it is. Otherwise it leaves later,
        in the background, after the last request that uses it.
        """
        async with self._locked(name):
            return await self._unload(name, force, timeout_seconds)

    async def rollback(self, name: str, version: str | None = None) -> AdapterEntry:
        """Let `name` stand for its version before the last change, or for `version` of its history."""
        async with self._locked(name):
            return await self._rollback(name, version)

    async def pin(self, name: str, *, pinned: bool) -> None:
        """Keep `name` in host memory, or stop doing so (`pinned` False). The pin follows the name to new versions."""
        async with self._locked(name):
            await (self._pins.pin(name) if pinned else self._pins.unpin(name))
        await self._changed()

    def view(self, name: str) -> AdapterView | None:
        """The view of one name; None if there is no such name."""
        return next((view for view in self.views() if view.entry.name == name), None)

    def views(self) -> tuple[AdapterView, ...]:
        """Views of all names: the loaded ones, the broken ones, then those that are being loaded for the first time."""
        registry = self.registry
        loading = {wanted.name: wanted.source for wanted in self._loads}
        entries: list[AdapterEntry | BrokenEntry | LoadingEntry] = [*registry.entries(), *registry.broken()]
        known = {entry.name for entry in entries}
        entries += [LoadingEntry(name, source) for name, source in loading.items() if name not in known]
        return tuple(self._view(entry, loading.get(entry.name)) for entry in entries)

    def _view(self, entry: AdapterEntry | BrokenEntry | LoadingEntry, loading: str | None) -> AdapterView:
        num_uses, last_used = self.registry.usage(entry.name)
        version = entry.version if isinstance(entry, AdapterEntry) else None
        return AdapterView(
            entry,
            num_requests=0 if version is None else self.registry.holds.count(version, Holder.REQUEST),
            num_uses=num_uses,
            last_used=last_used,
            tier="disk" if version is None else self.tiers.tier(version),
            num_loads=self._num_loads[entry.name],
            loading=loading,
            aliases=self.aliases.table.pointing_to(entry.name),
            is_pinned=entry.name in self._pins.names,
        )

    async def check(self, name: str, source: str) -> dict[str, Any]:
        """Check a source as `load` does, but without the probe of its effect, and keep nothing. Returns what the
        adapter would need, for JSON. Raises AdapterError."""
        check_name(name)
        located = await self._sources.locate(source)
        await self._sources.profile_beside(name, located)
        adapter = self._sources.checked(await self._sources.ingest(name, located, keep=False))
        self.tiers.check_room(adapter)
        return {
            "source": located.source,
            "version": adapter.version,
            "rank": adapter.max_rank,
            "modules_applied": adapter.modules_applied,
            "modules_possible": adapter.modules_possible,
            "num_bytes": adapter.num_bytes,
            "free_bytes": self.tiers.free_bytes,
            "notes": list(adapter.notes),
        }

    async def close(self) -> None:
        """Stop loads and other work in the background. Published adapters stay published."""
        tasks = list(self._loads.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.sharing.close()
        await self._retirement.close()
        self.tiers.close()
        self._sources.close()

    async def _timed(self, load: Awaitable[AdapterEntry]) -> AdapterEntry:
        started, result = time.monotonic(), "failed"
        try:
            entry = await load
            result = "ok"
        except AdapterError as error:
            result = "failed" if error.kind.is_failure else "refused"
            raise
        finally:
            self._on_load(result, time.monotonic() - started)
        return entry

    def _load_ended(self, wanted: LoadRequest, task: asyncio.Task[AdapterEntry]) -> None:
        del self._loads[wanted]
        if not task.cancelled():
            task.exception()  # callers that still wait get it; fetched here so that asyncio does not log it

    async def _load_locked(self, wanted: LoadRequest) -> AdapterEntry:
        async with self._locked(wanted.name):
            await self.sharing.sync()
            return await self._load(wanted)

    async def _load(self, wanted: LoadRequest) -> AdapterEntry:
        name, expected = wanted.name, wanted.expected_version
        self.registry.check_free(name, replace=wanted.replace)
        self._check_expected(name, expected)
        located = await self._sources.locate(wanted.source)
        before = self._listed(name)
        profile, origin = await self._sources.profile_for(name, located, wanted.profile, before)
        adapter = await self._sources.ingest(name, located)
        options: dict[str, Any] = {"replace": wanted.replace, "expected": expected}
        if wanted.profile is None:
            options["is_current"] = lambda: kept_profile(self._listed(name)) == kept_profile(before)
        try:
            adapter = self._sources.checked(adapter)
            return await self._publish(name, adapter, located.source, profile, origin, **options)
        finally:
            self.registry.holds.give_back(adapter.version, Holder.LOAD)

    async def _publish(
        self,
        name: str,
        adapter: LoadedAdapter,
        source: str,
        profile: Profile | None,
        origin: str,
        *,
        replace: bool,
        expected: str | None = None,
        again: bool = False,
        history: tuple[str, ...] = (),
        is_current: Callable[[], bool] = lambda: True,
    ) -> AdapterEntry:
        """Probe the effect of a version that is stored and held by the caller. Then let `name` stand for it.

        history: the name's earlier versions; only used if it is not loaded, or broken. is_current: whether `profile` is
        still the one to keep, since other servers may have changed it.
        """
        self.registry.stage(adapter)
        try:
            await self.tiers.register(adapter)
            effect = await self._probe.effect(adapter.version)
            await self.sharing.offer(adapter.version, self._sources.folder)
            published = time.monotonic()
            async with self.sharing.changing() as change:
                self._check_expected(name, expected)
                self.registry.check_free(name, replace=replace)
                if not is_current():
                    problem = f"another server has changed the profile of {name}; look at it and try again"
                    raise AdapterError(ErrorCode.REGISTRY_BUSY, problem)
                history = tuple(earlier for earlier in history if earlier != adapter.version)
                fields = None if profile is None else profile.public()
                saved = Saved(name, adapter.version, source, history, effect, fields, origin)
                listed = await change.publish(saved, again=again)
                entry = self.registry.publish(
                    name,
                    adapter,
                    source=source,
                    replace=replace,
                    history=history if listed is None else listed.history,
                    is_whole_history=listed is not None,
                    effect=effect,
                    profile=profile,
                    profile_from=origin,
                    again=again,
                )
                self._records.keep(name)
        finally:
            self.registry.unstage(adapter.version)
        self._retirement.stays(adapter.version)
        await self._settle()
        self._on_stage("publish", time.monotonic() - published)
        self._num_loads[name] += 1
        return entry

    async def _unload(self, name: str, force: bool, timeout_seconds: float) -> bool:
        async with self.sharing.changing() as change:
            entry = self._entry(name)
            is_local = entry is not None and name not in self._records.kept()  # of --adapter
            was_listed = not is_local and await change.remove(name)
            if entry is None:
                if was_listed:  # this server could not follow the list, and does not have it
                    return True
                raise adapter_not_found()
            self._forget(name)
        # Aliases may have led to earlier versions of the name: these leave, too.
        versions = {entry.version, *self.aliases.table.held}
        await self._settle()
        leaving = [version for version in versions if not self.registry.is_wanted(version)]
        if force:
            for version in leaving:
                self._engine.end_adapter(version)
        return await self._retirement.wait(leaving, timeout_seconds)

    async def _rollback(self, name: str, version: str | None) -> AdapterEntry:
        await self.sharing.sync()
        entry = self._listed(name)
        if entry is None:
            raise adapter_not_found()
        if not entry.history:
            raise AdapterError(ErrorCode.NO_HISTORY, f"{name} has had no other version to go back to", "name")
        matching = [old for old in entry.history if old.startswith(version or entry.history[-1])]
        if len(matching) != 1:
            raise AdapterError(
                ErrorCode.VERSION_MISSING, f"{name} has had no such version, or several; see its history", "version"
            )
        source = f"{ROLLED_BACK}{matching[0][:12]}"
        origin, profile = FROM_FILE if entry.profile_from == FROM_FILE else KEPT, entry.profile
        options: dict[str, Any] = {"replace": True, "history": entry.history, "again": True}
        options["is_current"] = lambda: (now := self._listed(name)) is not None and now.profile == profile
        self.registry.holds.take(matching[0], Holder.LOAD)
        try:
            adapter = await self._sources.stored(matching[0])
            return await self._publish(name, adapter, source, profile, origin, **options)
        finally:
            self.registry.holds.give_back(matching[0], Holder.LOAD)

    def _entry(self, name: str) -> AdapterEntry | BrokenEntry | None:
        broken = {entry.name: entry for entry in self.registry.broken()}
        return self.registry.resolve(name) or broken.get(name)

    def _listed(self, name: str) -> AdapterEntry | BrokenEntry | None:
        """The entry of a name; if this server could not follow the shared list for it, the list's entry."""
        return self.sharing.behind(name) or self._entry(name)

    def _forget(self, name: str) -> None:
        """Remove a name from this server."""
        self.registry.remove(name)
        self._records.drop(name)
        self._num_loads.pop(name, None)
        self._pins.names.discard(name)

    def _broke(self, version: str) -> None:
        """Handle a version whose stored copy is damaged or gone. Its names are listed as broken already."""
        self.aliases.table.lose(version)
        self._on_change()

    def _check_expected(self, name: str, expected: str | None) -> None:
        entry = self.sharing.behind(name) or self.registry.resolve(name)
        if expected is not None and (entry is None or entry.version != expected):
            now = "is not loaded" if entry is None else f"stands for version {entry.version}"
            problem = f"{name} {now}: it does not stand for the expected version"
            raise AdapterError(ErrorCode.VERSION_CONFLICT, problem, "expected_version")

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[None]:
        """Hold a name's lock: its changes happen one after the other."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._lock_users[name] += 1
        try:
            async with lock:
                yield
        finally:
            self._lock_users[name] -= 1
            if not self._lock_users[name]:
                del self._lock_users[name], self._locks[name]

    async def _settle(self) -> None:
        """As `_changed`, after holding the versions to which aliases lead now."""
        await self.aliases.refresh()
        await self._changed()

    async def _changed(self) -> None:
        """Called after names have changed: move pins, save, and call `on_change`."""
        await self._pins.refresh()
        await self._records.save(self._sources.on_thread, **self._pins.saved())
        self._on_change()
