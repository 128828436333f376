"""The names that a restart brings back: those that were loaded while the server ran, as the registry's file lists them.

Writes the file when the registry changes, and restores from it. Reads no adapters itself. Called by the adapter
manager.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import LoadedAdapter
from guanaco.adapters.versions.aliases import Alias, AliasTable
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.profile import Profile
from guanaco.adapters.versions.registry import AdapterRegistry, BrokenEntry
from guanaco.adapters.versions.registry_file import RegistryFile, Saved, SavedList
from guanaco.models.error_codes import ErrorCode

logger = logging.getLogger(__name__)

_PARTY = "records"  # its name in the ledger of holds

OnThread = Callable[[Callable[[], None]], Awaitable[None]]  # runs a function off the event loop


class AdapterRecords:
    """The file of one registry."""

    def __init__(self, registry: AdapterRegistry, aliases: AliasTable, saved: RegistryFile) -> None:
        self._registry = registry
        self._aliases = aliases
        self._saved = saved
        self._persistent: set[str] = set()  # names that come back after a restart
        self._shadowed: dict[str, Saved] = {}  # records whose names --adapter has taken; kept for a start without it
        self._saving = asyncio.Lock()

    def restore(
        self,
        read: Callable[[str], LoadedAdapter],
        profile: Callable[[Mapping[str, Any]], Profile],
        stays: Callable[[LoadedAdapter], bool],
    ) -> tuple[str, ...]:
        """Publish the adapters that were loaded before a restart. Returns notes for the operator. Called once, before
        the engine runs.

        read: reads the adapter of a version. profile: makes a profile from its fields. stays: whether an adapter stays
        in host memory. All may raise AdapterError. A name that --adapter has taken stays as it is. A name whose copy is
        gone or damaged is listed as broken.
        """
        self._saved.remove_leftovers()
        self._registry.version_keys.restore(self._saved.read_version_keys())
        notes = []
        listed = self._saved.read()
        self._hold(_versions_of(listed, self._saved.read_aliases()))
        for record in listed:
            self._persistent.add(record.name)
            try:
                self._registry.check_free(record.name)
                asked = None if record.profile is None else profile(record.profile)
                adapter = read(record.version)
                self._registry.publish(
                    record.name,
                    adapter,
                    source=record.source,
                    history=record.history,
                    effect=record.effect,
                    profile=asked,
                    profile_from=record.profile_from,
                    again=self._registry.version_keys.of(record.name, record.version) is not None,
                    in_memory=stays(adapter),
                )
            except AdapterError as error:
                if error.code == ErrorCode.NAME_TAKEN:
                    self._persistent.discard(record.name)
                    self._shadowed[record.name] = record
                    notes.append(
                        f"adapter {record.name}: --adapter has this name; the adapter loaded under it is not served"
                    )
                    continue
                self._registry.add_broken(
                    BrokenEntry(
                        record.name,
                        record.version,
                        record.source,
                        error.code,
                        str(error),
                        history=record.history,
                        # If the profile itself is at fault, only its list of allowed keys is kept.
                        profile=restriction(record.profile or {}, profile)
                        if error.code == ErrorCode.BAD_PROFILE
                        else profile(record.profile or {}),
                        profile_from=record.profile_from,
                    )
                )
                notes.append(f"adapter {record.name} is broken: {error}")
        notes += self._restore_aliases(read, stays)
        return tuple(notes)

    def _restore_aliases(
        self, read: Callable[[str], LoadedAdapter], stays: Callable[[LoadedAdapter], bool]
    ) -> list[str]:
        self._aliases.restore(self._saved.read_aliases())
        notes = [
            f"alias {alias.name} is not used: --adapter has this name"
            for alias in self._aliases.all()
            if self._registry.is_taken(alias.name)
        ]
        for version in sorted(self._aliases.pinned()):
            if self._registry.knows(version):
                continue
            try:
                adapter = read(version)
                in_memory = stays(adapter)
                self._registry.stage(adapter)
                if in_memory:
                    self._registry.keep(adapter)
                self._registry.unstage(version)
            except AdapterError as error:
                notes.append(f"an alias leads to version {version[:12]}, which could not be read: {error}")
        return notes

    def keep(self, name: str) -> None:
        """From now on, a restart brings `name` back."""
        self._persistent.add(name)
        self._shadowed.pop(name, None)

    def drop(self, name: str) -> None:
        """From now on, a restart does not bring `name` back."""
        self._persistent.discard(name)
        self._shadowed.pop(name, None)

    def kept(self) -> frozenset[str]:
        """The names that a restart brings back."""
        return frozenset(self._persistent)

    def adopt(self, read: Callable[[], SavedList | None], parts: Iterable[str]) -> tuple[str, ...]:
        """Put the names and aliases of a shared list into the file, for `restore`. Returns notes for the operator.

        read: returns the list, or None without one. parts: the parts of the file that stay as they are, such as the
        pinned names. If the list can't be read, the file stays, and a note says so. Raises AdapterError if the file
        can't be written.
        """
        try:
            listed = read()
        except AdapterError as error:
            return (f"{error}; the adapters that this server knew last are served",)
        if listed is None:
            return ()
        try:
            self._saved.write_list(listed, **{part: self._saved.read_names(part) for part in parts})
        except OSError as error:
            problem = f"the adapter store cannot be written: {error.strerror or error}"
            problem += "; free some space, or make the directory writable"
            raise AdapterError(ErrorCode.STORE_FAILED, problem) from None
        return ()

    def names(self, part: str) -> tuple[str, ...]:
        """The list of names that was saved under `part` before a restart."""
        return self._saved.read_names(part)

    async def save(self, on_thread: OnThread, **names: frozenset[str]) -> None:
        """Write the registry's file: what a restart brings back, and further lists of names by part. If writing fails,
        the change itself stands, and the log has an error.

        Versions that the file names are held. Until the new file is written, those of the old one are held, too. So no
        stored copy is removed while a file names it.
        """
        async with self._saving:
            ready = (
                Saved(e.name, e.version, e.source, e.history, e.effect, _plain(e.profile), e.profile_from)
                for e in self._registry.entries()
            )
            broken = (
                Saved(b.name, b.version, b.source, b.history, None, _plain(b.profile), b.profile_from)
                for b in self._registry.broken()
            )
            kept = (record for record in (*ready, *broken) if record.name in self._persistent)
            records, aliases = (*kept, *self._shadowed.values()), self._aliases.all()
            keys = self._registry.version_keys.records(self._registry.holds.held())
            versions = _versions_of(records, aliases)
            self._hold(versions | self._registry.holds.assigned(_PARTY, Holder.HISTORY))
            try:
                await on_thread(partial(self._saved.write, records, aliases, keys, **names))
                self._hold(versions)
            except OSError as error:
                logger.error(
                    "the list of adapters could not be written (%s): a restart would not know this change", error
                )

    def _hold(self, versions: frozenset[str]) -> None:
        self._registry.holds.assign(_PARTY, {Holder.HISTORY: versions})


def _versions_of(records: Iterable[Saved], aliases: Iterable[Alias]) -> frozenset[str]:
    """All versions that a registry's file names."""
    named = [version for record in records for version in (record.version, *record.history)]
    return frozenset(named).union(*(alias.versions for alias in aliases))


def restriction(fields: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Profile]) -> Profile | None:
    """The allowed keys of a profile that is otherwise unusable, as a profile of its own; None if it allows all keys. If
    they can't be read either, no key is allowed."""
    if (keys := fields.get("allowed_keys")) is None:
        return None
    try:
        return parse({"allowed_keys": keys})
    except AdapterError:
        return Profile(allowed_keys=())


def _plain(profile: Profile | None) -> dict[str, Any] | None:
    return None if profile is None else profile.public()
