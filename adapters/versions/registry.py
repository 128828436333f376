"""Names → immutable adapter versions, and the host copies of the versions in memory.

The event loop reads names and the engine thread reads versions, at any time: both see a consistent snapshot without a
lock. A write replaces the whole snapshot, under a lock. A version stays known while the ledger `holds` has a use of it.
Another ledger (`residency.host_table`) decides whether its copy is in memory. Knows nothing of slots, requests or HTTP.
"""

import threading
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from guanaco.adapters.errors import AdapterError, adapter_not_found
from guanaco.adapters.peft.weights import AdapterLimits, BaseTable, LoadedAdapter, load_adapter
from guanaco.adapters.versions.holds import Holder, HoldLedger
from guanaco.adapters.versions.names import check_name
from guanaco.adapters.versions.profile import FROM_FILE, GIVEN, KEPT, KEPT_NOTE, Profile, read_profile
from guanaco.adapters.versions.version_keys import VersionKeys
from guanaco.models.error_codes import ErrorCode

MAX_HISTORY = 8  # versions that a name can be rolled back to


def next_history(before: str, history: tuple[str, ...], version: str) -> tuple[str, ...]:
    """The new history of a name that stood for `before` with `history`, and stands for `version` from now on."""
    if before == version:
        return history
    return (*(earlier for earlier in history if earlier not in (before, version)), before)[-MAX_HISTORY:]


@dataclass(frozen=True)
class AdapterEntry:
    """What a name stands for at one moment; replacing an adapter makes a new entry."""

    name: str
    version: str
    source: str  # the path it was read from, as the operator wrote it
    loaded_at: float  # seconds since the epoch
    max_rank: int
    num_bytes: int
    modules_applied: int
    modules_possible: int
    notes: tuple[str, ...]
    history: tuple[str, ...] = ()  # earlier versions, the latest last
    effect: float | None = None  # largest change of a logit on the probe prompt; None: not measured
    profile: Profile | None = None  # how it wants to be served
    profile_from: str = FROM_FILE  # or GIVEN, KEPT
    version_keys: tuple[str, ...] | None = None  # ids of the keys that this version was published for; None: all


@dataclass(frozen=True)
class BrokenEntry:
    """A name whose version could not be restored at start, or could not be read later. It is listed, but requests for
    it fail; the server runs on."""

    name: str
    version: str
    source: str
    code: ErrorCode  # of the AdapterError
    problem: str
    history: tuple[str, ...] = ()  # as in AdapterEntry: the versions that it may be rolled back to
    profile: Profile | None = None
    profile_from: str = FROM_FILE


@dataclass(frozen=True)
class _Snapshot:
    entries: MappingProxyType[str, AdapterEntry]
    broken: MappingProxyType[str, BrokenEntry]
    versions: frozenset[str]  # all known versions, in memory or not
    copies: MappingProxyType[str, LoadedAdapter]  # of the versions in memory


class AdapterRegistry:
    """The adapters of one base model. `targets` and `base_names` belong to the base; no adapter may have one of its
    names."""

    def __init__(
        self,
        targets: dict[str, tuple[int, int]],
        *,
        base_names: tuple[str, ...],
        limits: AdapterLimits | None = None,
        templates: frozenset[str] = frozenset(),
        base_table: BaseTable | None = None,
    ) -> None:
        """templates: the names of chat templates that profiles may ask for. base_table: see `load_adapter`."""
        self._base_table = base_table
        self.templates = templates
        self._targets = dict(targets)
        self._base_names = frozenset(base_names)
        self._limits = limits or AdapterLimits()
        self._lock = threading.Lock()
        self.version_keys = VersionKeys()
        self.holds = HoldLedger()
        self._num_uses: Counter[str] = Counter()  # requests by name, since the start
        self._last_used: dict[str, float] = {}
        self._alias_names: frozenset[str] = frozenset()
        nothing: MappingProxyType[str, AdapterEntry] = MappingProxyType({})
        self._snapshot = _Snapshot(nothing, MappingProxyType({}), frozenset(), MappingProxyType({}))
        self._staged: dict[str, LoadedAdapter] = {}  # versions being tried out, for `staged`

    def load(self, name: str, path: Path, profile: Profile | None = None) -> AdapterEntry:
        """Read, check and publish the adapter at `path` under `name`. Blocks until it was read.

        profile: how to serve it; None: use the file beside it.
        Raises AdapterError for a bad or taken name, and for everything `load_adapter` refuses; then nothing changes.
        """
        self.check_free(name)
        adapter = load_adapter(
            path,
            self._targets,
            name=name,
            limits=self._limits,
            base_table=self._base_table,
        )
        origin = FROM_FILE if profile is None else GIVEN
        profile = profile or read_profile(path, name, self.templates)
        return self.publish(name, adapter, source=str(path), profile=profile, profile_from=origin, in_memory=True)

    def publish(
        self,
        name: str,
        adapter: LoadedAdapter,
        *,
        source: str,
        replace: bool = False,
        history: tuple[str, ...] = (),
        effect: float | None = None,
        profile: Profile | None = None,
        profile_from: str = FROM_FILE,
        again: bool = False,
        in_memory: bool = False,
        is_whole_history: bool = False,
    ) -> AdapterEntry:
        """Make `name` stand for `adapter`.

        history: for a new name; a name that is replaced keeps its own history, unless `is_whole_history`.
        again: the version was published under this name before; it stays for the keys that it was published for.
        in_memory: also keep the copy. Otherwise it is read when it is wanted, and then given to `keep`.

        Raises AdapterError for a bad name, and for a taken one unless `replace`; then nothing changes.
        """
        with self._lock:
            self.check_free(name, replace=replace)
            before = self._snapshot.entries.get(name)
            if before is not None and not is_whole_history:
                history = next_history(before.version, before.history, adapter.version)
            if not again:
                self.version_keys.note(name, adapter.version, None if profile is None else profile.allowed_keys)
            entry = AdapterEntry(
                name=name,
                version=adapter.version,
                source=source,
                loaded_at=time.time(),
                max_rank=adapter.max_rank,
                num_bytes=adapter.num_bytes,
                modules_applied=adapter.modules_applied,
                modules_possible=adapter.modules_possible,
                notes=(*adapter.notes, KEPT_NOTE) if profile_from == KEPT else adapter.notes,
                history=history[-MAX_HISTORY:],
                effect=effect,
                profile=profile,
                profile_from=profile_from,
                version_keys=self.version_keys.of(name, adapter.version),
            )
            copies = dict(self._snapshot.copies)
            if in_memory:
                copies.setdefault(adapter.version, adapter)  # the same content under two names is kept once
            self._swap(
                entries={**self._snapshot.entries, name: entry},
                broken={other: it for other, it in self._snapshot.broken.items() if other != name},
                versions=self._snapshot.versions | {adapter.version},
                copies=copies,
            )
        return entry

    def add_broken(self, entry: BrokenEntry) -> None:
        """List a name that can't be served. Raises AdapterError if the name is taken."""
        with self._lock:
            self.check_free(entry.name)
            self._swap(broken={**self._snapshot.broken, entry.name: entry})

    def mark_broken(self, version: str, code: ErrorCode, problem: str) -> None:
        """List the names that stand for a version as broken from now on, since it can't be read any more."""
        with self._lock:
            broken = dict(self._snapshot.broken)
            for e in self._snapshot.entries.values():
                if e.version == version:
                    broken[e.name] = BrokenEntry(
                        e.name, version, e.source, code, problem, e.history, e.profile, e.profile_from
                    )
            entries = {name: e for name, e in self._snapshot.entries.items() if e.version != version}
            self._swap(entries=entries, broken=broken)

    def restrict(self, name: str, keys: tuple[str, ...]) -> None:
        """Let only these keys use what a name stands for now, beside the restrictions that it has. Does nothing for an
        unknown name."""
        with self._lock:
            if (entry := self._snapshot.entries.get(name)) is not None:
                kept = keys if entry.version_keys is None else tuple(key for key in entry.version_keys if key in keys)
                self._swap(entries={**self._snapshot.entries, name: replace(entry, version_keys=kept)})

    def remove(self, name: str) -> AdapterEntry | BrokenEntry:
        """Forget a name; its version goes when its last use ends. Raises AdapterError if the name doesn't exist."""
        with self._lock:
            entry = self._snapshot.entries.get(name) or self._snapshot.broken.get(name)
            if entry is None:
                raise adapter_not_found()
            entries = {other: it for other, it in self._snapshot.entries.items() if other != name}
            broken = {other: it for other, it in self._snapshot.broken.items() if other != name}
            self._swap(entries=entries, broken=broken)
            self._num_uses.pop(name, None)
            self._last_used.pop(name, None)
        return entry

    def stage(self, adapter: LoadedAdapter) -> None:
        """Make a version known that no name stands for yet, so that it can be tried out. The caller must hold it."""
        with self._lock:
            self._staged[adapter.version] = adapter
            self._swap(versions=self._snapshot.versions | {adapter.version})

    def unstage(self, version: str) -> None:
        """End `stage`: `staged` no longer returns the version, but it stays known."""
        with self._lock:
            self._staged.pop(version, None)

    def staged(self, version: str) -> LoadedAdapter | None:
        """The copy of a version that is being tried out, which need not be read; None for other versions."""
        return self._staged.get(version)

    def keep(self, adapter: LoadedAdapter) -> None:
        """Keep the copy of a known version, which is in memory now."""
        with self._lock:
            if adapter.version in self._snapshot.versions:
                self._swap(copies={**self._snapshot.copies, adapter.version: adapter})

    def let_go(self, version: str) -> None:
        """Drop a version's copy from memory; the version stays known."""
        with self._lock:
            self._swap(copies={other: it for other, it in self._snapshot.copies.items() if other != version})

    def acquire(self, name: str, version: str | None = None) -> AdapterEntry | None:
        """As `resolve`, and hold the version for a request: it stays usable until `release`."""
        with self._lock:
            entry = self.resolve(name, version)
            if entry is not None:
                self.holds.take(entry.version, Holder.REQUEST)
                self._num_uses[name] += 1
                self._last_used[name] = time.time()
        return entry

    def hold(self, version: str, holder: Holder) -> bool:
        """Hold a version, and return whether it is known; a known version stays known until the hold ends. An unknown
        version is held, too: the caller must end the hold in both cases."""
        with self._lock:
            self.holds.take(version, holder)
            return self.knows(version)

    def release(self, version: str) -> None:
        """End the hold of `acquire`."""
        self.holds.give_back(version, Holder.REQUEST)

    def usage(self, name: str) -> tuple[int, float | None]:
        """(uses of a name since the start, time of the last one in seconds since the epoch)."""
        return self._num_uses.get(name, 0), self._last_used.get(name)

    def drop(self, version: str) -> bool:
        """Forget a version and its copy if nobody uses it. Returns True if it was known and now isn't."""
        with self._lock:
            if not self.knows(version) or self.holds.is_used(version):
                return False
            copies = {other: it for other, it in self._snapshot.copies.items() if other != version}
            self._swap(versions=self._snapshot.versions - {version}, copies=copies)
        return True

    def resolve(self, name: str, version: str | None = None) -> AdapterEntry | None:
        """The entry of `name`. version: the entry has this version in place of its own. None if the name isn't
        registered, or if no alias leads to this version."""
        snapshot = self._snapshot
        entry = snapshot.entries.get(name)
        if entry is None or version in (None, entry.version):
            return entry
        if not self.holds.count(version, Holder.ALIAS) or version not in snapshot.versions:
            return None
        return replace(entry, version=version, version_keys=self.version_keys.of(name, version))

    def is_wanted(self, version: str) -> bool:
        """Whether a name stands for this version, or an alias leads to it."""
        return bool(self.holds.count(version, Holder.NAME) or self.holds.count(version, Holder.ALIAS))

    def is_taken(self, name: str) -> bool:
        """Whether the base or an adapter, even a broken one, has this name."""
        return name in self._base_names or name in self._snapshot.entries or name in self._snapshot.broken

    def heed_aliases(self, names: frozenset[str]) -> None:
        """Set the names of all aliases, which no adapter may take."""
        with self._lock:
            for gone in self._alias_names - names - self._snapshot.entries.keys():
                self._num_uses.pop(gone, None)
                self._last_used.pop(gone, None)
            self._alias_names = names

    def count_use(self, alias: str) -> None:
        """Count a request that used an alias."""
        with self._lock:
            self._num_uses[alias] += 1
            self._last_used[alias] = time.time()

    def names(self) -> frozenset[str]:
        """The names that stand for a version now."""
        return frozenset(self._snapshot.entries)

    def names_by_version(self) -> dict[str, str]:
        """{version: name} for present and earlier versions of names: requests may still hold the earlier ones. Of
        several names of one version it has only one."""
        entries = self._snapshot.entries.values()
        earlier = {version: entry.name for entry in entries for version in entry.history}
        return {**earlier, **{entry.version: entry.name for entry in entries}}

    def names_of(self, versions: Container[str]) -> tuple[str, ...]:
        """The names that stand for one of these versions now. Any thread may call it."""
        return tuple(entry.name for entry in self._snapshot.entries.values() if entry.version in versions)

    def entries(self) -> tuple[AdapterEntry, ...]:
        """Every adapter, in the order of registration."""
        return tuple(self._snapshot.entries.values())

    def broken(self) -> tuple[BrokenEntry, ...]:
        """The names that can't be served: their versions could not be restored or read."""
        return tuple(self._snapshot.broken.values())

    def host_copy(self, version: str) -> LoadedAdapter:
        """The tensors of a version in memory. Raises KeyError if it isn't in memory."""
        return self._snapshot.copies[version]

    def knows(self, version: str) -> bool:
        """Whether a version is known, in memory or not."""
        return version in self._snapshot.versions

    def versions(self) -> frozenset[str]:
        """All known versions, in memory or not, with a name or without."""
        return self._snapshot.versions

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies in memory, each version counted once."""
        return sum(adapter.num_bytes for adapter in self._snapshot.copies.values())

    @property
    def num_copies(self) -> int:
        """The number of versions in memory. Any thread may ask."""
        return len(self._snapshot.copies)

    def check_free(self, name: str, *, replace: bool = False) -> None:
        """Raises AdapterError for an invalid name, for the base's, and for a taken one unless `replace`."""
        check_name(name)
        if name in self._base_names:
            problem = f"{name} is the base model's name; give the adapter another one, or set --served-model-name"
            raise AdapterError(ErrorCode.NAME_TAKEN, problem, "name")
        if name in self._alias_names and name not in self._snapshot.entries:
            problem = f"{name} is an alias; choose another name, or remove the alias"
            raise AdapterError(ErrorCode.NAME_TAKEN, problem, "name")
        if name in self._snapshot.entries and not replace:
            problem = f"an adapter called {name} is there already; choose another name"
            raise AdapterError(ErrorCode.NAME_TAKEN, problem, "name")

    def _swap(
        self,
        *,
        entries: Mapping[str, AdapterEntry] | None = None,
        broken: Mapping[str, BrokenEntry] | None = None,
        versions: frozenset[str] | None = None,
        copies: Mapping[str, LoadedAdapter] | None = None,
    ) -> None:
        """Replace the snapshot; parts that aren't given stay. The caller holds the lock."""
        old = self._snapshot
        self._snapshot = _Snapshot(
            old.entries if entries is None else MappingProxyType(dict(entries)),
            old.broken if broken is None else MappingProxyType(dict(broken)),
            old.versions if versions is None else versions,
            old.copies if copies is None else MappingProxyType(dict(copies)),
        )
        if entries is None and broken is None:
            return
        served, lost = self._snapshot.entries.values(), self._snapshot.broken.values()
        names = [entry.version for entry in served]
        history = [version for entry in served for version in entry.history]
        history += [version for entry in lost for version in (*entry.history, entry.version)]
        self.holds.assign("registry", {Holder.NAME: names, Holder.HISTORY: history})
