"""Makes this server's names and aliases equal to a list that several servers share.

A name whose new version can't be served keeps its former version, if it had one. Lives on the event loop. Called by
`sharing`, for one list at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.aliases import AliasTable
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.profile import Profile
from guanaco.adapters.versions.registry import AdapterEntry, AdapterRegistry, BrokenEntry
from guanaco.adapters.versions.registry_file import Saved, SavedList
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.records import AdapterRecords, restriction
from guanaco.server.adapters.sources import AdapterSources
from guanaco.server.adapters.tiers import AdapterTiers


@dataclass(frozen=True)
class Behind:
    """A name that is not served as the list says, and why."""

    record: Saved
    code: ErrorCode
    problem: str
    profile: Profile | None  # the list's; if it can't be read, its allowed keys alone

    def public(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"name": self.record.name, "version": self.record.version, "code": self.code, "message": self.problem}

    def as_broken(self) -> BrokenEntry:
        """The list's entry as a broken one. It keeps the profile, and the history for a roll-back."""
        record = self.record
        return BrokenEntry(
            record.name,
            record.version,
            record.source,
            self.code,
            self.problem,
            history=record.history,
            profile=self.profile,
            profile_from=record.profile_from,
        )


class ListFollower:
    """Applies lists to one registry and its aliases."""

    def __init__(
        self,
        registry: AdapterRegistry,
        table: AliasTable,
        sources: AdapterSources,
        tiers: AdapterTiers,
        records: AdapterRecords,
        *,
        on_publish: Callable[[str], None],
        forget: Callable[[str], None],
    ) -> None:
        """on_publish: called with each version that was published. forget: removes a name."""
        self._registry = registry
        self._table = table
        self._sources = sources
        self._tiers = tiers
        self._records = records
        self._on_publish = on_publish
        self._forget = forget

    async def apply(self, wanted: SavedList) -> tuple[Behind, ...]:
        """Publish, replace and remove names until they are those of the list, then set its aliases.

        Returns the names for which that failed. Names of --adapter stay as they are.
        """
        self._set_version_keys(wanted)
        behind = [problem for record in wanted.records if (problem := await self._follow(record)) is not None]
        if wanted.aliases != self._table.all():
            self._table.restore(wanted.aliases)
        names = {record.name for record in wanted.records}
        for name in self._records.kept() - names:
            self._forget(name)
        left = []
        for one in behind:
            if one.code == ErrorCode.NAME_TAKEN:  # the alias or name in its way may be gone now: try once more
                again = await self._follow(one.record)
                left += [] if again is None else [again]
            else:
                left.append(one)
        return tuple(left)

    async def _follow(self, record: Saved) -> Behind | None:
        entry = self._registry.resolve(record.name)
        if entry is not None and (record.name not in self._records.kept() or self._is_same(entry, record)):
            return None
        try:
            await self._publish(record)
        except AdapterError as error:
            # The former version stays, but must not be open to more keys than the list allows.
            profile = self._profile(record)
            if entry is not None and profile is not None and profile.allowed_keys is not None:
                self._registry.restrict(record.name, profile.allowed_keys)
            return Behind(record, error.code, str(error), profile)
        return None

    def _profile(self, record: Saved) -> Profile | None:
        if record.profile is None:
            return None
        try:
            return self._sources.profile(record.profile)
        except AdapterError:
            return restriction(record.profile, self._sources.profile)

    async def _publish(self, record: Saved) -> None:
        registry, version = self._registry, record.version
        registry.check_free(record.name, replace=True)
        profile = None if record.profile is None else self._sources.profile(record.profile)
        registry.holds.take(version, Holder.LOAD)
        try:
            adapter = self._sources.checked(await self._sources.stored(version))
            registry.stage(adapter)
            try:
                await self._tiers.register(adapter)
                registry.publish(
                    record.name,
                    adapter,
                    source=record.source,
                    replace=True,
                    history=record.history,
                    is_whole_history=True,
                    effect=record.effect,
                    profile=profile,
                    profile_from=record.profile_from,
                    again=True,
                )
            finally:
                registry.unstage(version)
            self._records.keep(record.name)
            self._on_publish(version)
        finally:
            registry.holds.give_back(version, Holder.LOAD)

    def _is_same(self, entry: AdapterEntry, record: Saved) -> bool:
        profile = None if entry.profile is None else entry.profile.public()
        keys = self._registry.version_keys.of(record.name, record.version)
        return (entry.version, entry.history, entry.source, profile, entry.version_keys) == (
            record.version,
            record.history,
            record.source,
            _as_public(record.profile),
            keys,
        )

    def _set_version_keys(self, wanted: SavedList) -> None:
        """Note the keys for which each version was published, before any version is served."""
        keys = {(name, version): ids for name, version, ids in wanted.version_keys}
        for record in wanted.records:
            of_aliases = frozenset().union(*(alias.versions_of(record.name) for alias in wanted.aliases))
            for version in {record.version, *record.history, *of_aliases}:
                self._registry.version_keys.note(record.name, version, keys.get((record.name, version)))


def _as_public(profile: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if profile is None else dict(profile)
