"""Aliases: names that lead to other names or to pinned versions of them, to one target or to several by weight.

Plain data without tensors. The table says which adapter a request gets, and keeps the earlier revisions of each alias.
The registry knows which versions are loaded; the table tells the ledger of holds which versions must stay. Called by
`server.api.generation.catalog` (from any thread) and by `server.adapters`.
"""

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from guanaco.adapters.errors import AdapterError, alias_not_found
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.names import check_name
from guanaco.adapters.versions.registry import MAX_HISTORY, AdapterRegistry
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.shown import printable

MAX_ALIASES = 1024
MAX_TARGETS = 8
MAX_WEIGHT = 1_000_000
_PARTY = "aliases"  # the name of this table in the ledger of holds

_TARGET = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(?P<version>[0-9a-f]{6,64}))?")


@dataclass(frozen=True)
class Target:
    """Where an alias leads: to the present version of `name`, or to one fixed version of it."""

    name: str  # of an adapter, or of another alias
    version: str | None = None  # the whole digest, once it is in the table
    weight: int = 1

    @property
    def text(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Revision:
    """One state of an alias, and when it began."""

    number: int  # number of the alias's change, from 1
    changed_at: float  # seconds since the epoch
    targets: tuple[Target, ...]

    def public(self) -> dict[str, Any]:
        """Plain data, for JSON; `split` has the form that the routes accept."""
        split = {target.text: target.weight for target in self.targets}
        return {"revision": self.number, "changed_at": self.changed_at, "split": split}


@dataclass(frozen=True)
class Alias:
    """One alias: its present revision and at most MAX_HISTORY earlier ones."""

    name: str
    now: Revision
    history: tuple[Revision, ...] = ()  # the latest last

    def choose(self, key: str) -> Target:
        """One target, chosen by weight. The same key gets the same target until the targets change. With two targets, a
        new weight moves as few keys as possible."""
        total = sum(target.weight for target in self.now.targets)
        digest = hashlib.sha256(f"{self.name}\0{key}".encode("utf-8", "surrogatepass")).digest()
        point = int.from_bytes(digest[:8]) * total >> 64
        for target in self.now.targets:
            if point < target.weight:
                return target
            point -= target.weight
        raise AssertionError("an alias has a target with a weight")

    @property
    def versions(self) -> frozenset[str]:
        """All pinned versions that this alias leads to, or led to in a revision of its history."""
        revisions = (self.now, *self.history)
        return frozenset(t.version for revision in revisions for t in revision.targets if t.version is not None)

    def versions_of(self, name: str) -> frozenset[str]:
        """The pinned versions of one name that this alias leads to, or led to in a revision of its history."""
        revisions = (self.now, *self.history)
        return frozenset(t.version for r in revisions for t in r.targets if t.name == name and t.version is not None)

    def changed(self, targets: tuple[Target, ...], now: float) -> "Alias":
        """A copy with a new revision: these targets from `now` on."""
        history = (*self.history, self.now)[-MAX_HISTORY:]
        return Alias(self.name, Revision(self.now.number + 1, now, targets), history)


def parse_targets(split: Mapping[str, int]) -> tuple[Target, ...]:
    """The targets of `{"name" or "name@version": weight}`. Versions may still be prefixes. Raises AdapterError."""
    if not 1 <= len(split) <= MAX_TARGETS:
        raise AdapterError(ErrorCode.BAD_SPLIT, f"give 1 to {MAX_TARGETS} targets", "split")
    targets = []
    for text, weight in split.items():
        match = _TARGET.fullmatch(text)
        if match is None:
            problem = f"{printable(text)!r} is no target: write NAME, or NAME@VERSION with 6 to 64 hex digits"
            raise AdapterError(ErrorCode.BAD_TARGET, problem, "split")
        if not 0 <= weight <= MAX_WEIGHT:
            raise AdapterError(ErrorCode.BAD_SPLIT, f"a weight must be a whole number from 0 to {MAX_WEIGHT}", "split")
        targets.append(Target(match["name"], match["version"], weight))
    if not any(target.weight for target in targets):
        raise AdapterError(ErrorCode.BAD_SPLIT, "at least one weight must be above 0", "split")
    return tuple(targets)


class AliasTable:
    """All aliases over one registry. An adapter's name takes precedence over an alias with the same name."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._aliases: MappingProxyType[str, Alias] = MappingProxyType({})
        self._lost: frozenset[str] = frozenset()  # versions with damaged or missing copies

    def get(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def all(self) -> tuple[Alias, ...]:
        return tuple(self._aliases.values())

    def names(self) -> tuple[str, ...]:
        """The aliases whose names no adapter has."""
        return tuple(name for name in self._aliases if self._registry.resolve(name) is None)

    def follow(self, name: str, key: str) -> Target | None:
        """The adapter that a request with this key gets through the alias `name`; the adapter need not be loaded. None
        if `name` is no alias."""
        aliases = self._aliases
        alias = aliases.get(name)
        if alias is None:
            return None
        while alias is not None:
            target = alias.choose(key)
            loaded = target.version is not None or self._registry.resolve(target.name) is not None
            alias = None if loaded else aliases.get(target.name)
        return target

    def leads_to(self, name: str) -> tuple[Target, ...]:
        """Every adapter that some key can get through the alias `name`, each once. Empty if `name` is no alias."""
        aliases, found, open_names, seen = self._aliases, {}, [name], {name}
        while open_names:
            alias = aliases.get(open_names.pop())
            for target in () if alias is None else alias.now.targets:
                is_alias = target.version is None and self._registry.resolve(target.name) is None
                if not target.weight or (is_alias and target.name in seen):
                    continue
                if is_alias and target.name in aliases:
                    seen.add(target.name)
                    open_names.append(target.name)
                else:
                    found[target.text] = target
        return tuple(found.values())

    def pointing_to(self, name: str) -> tuple[str, ...]:
        """The aliases with `name` among their targets."""
        return tuple(a.name for a in self._aliases.values() if any(t.name == name for t in a.now.targets))

    def put(self, name: str, targets: tuple[Target, ...], *, now: float, expected: int | None = None) -> Alias:
        """Make `name` lead to `targets`, whose versions are whole digests that the registry knows.

        expected: the number of the present revision, 0 if there must be none. Raises AdapterError; then nothing
        changes.
        """
        with self._lock:
            self._check_name(name)
            before = self._aliases.get(name)
            number = 0 if before is None else before.now.number
            if expected is not None and expected != number:
                problem = f"{name} has revision {number}, not the expected one; look at it and try again"
                raise AdapterError(ErrorCode.REVISION_CONFLICT, problem, "expected_revision")
            if before is None and len(self._aliases) >= MAX_ALIASES:
                raise AdapterError(ErrorCode.TOO_MANY_ALIASES, f"there are {MAX_ALIASES} aliases; remove one first")
            if len({target.text for target in targets}) != len(targets):
                raise AdapterError(
                    ErrorCode.BAD_SPLIT, "two of the targets are the same one: add their weights up", "split"
                )
            for target in targets:
                self._check_target(name, target)
            alias = Alias(name, Revision(1, now, targets)) if before is None else before.changed(targets, now)
            self._swap({**self._aliases, name: alias})
        return alias

    def remove(self, name: str) -> Alias:
        """Forget an alias. Raises AdapterError if it doesn't exist."""
        with self._lock:
            alias = self._found(name)
            self._swap({other: it for other, it in self._aliases.items() if other != name})
        return alias

    def rename(self, name: str, new: str) -> Alias:
        """Rename an alias, and change the aliases that lead to it, in one step. Raises AdapterError."""
        with self._lock:
            self._found(name)
            self._check_name(new)
            if new in self._aliases:
                raise AdapterError(
                    ErrorCode.NAME_TAKEN, f"there is an alias called {new} already; remove it first", "name"
                )
            if new in self._reachable(name):
                raise _cycle(name, new)
            aliases = (_renamed(alias, name, new) for alias in self._aliases.values())
            self._swap({alias.name: alias for alias in aliases})
            return self._aliases[new]

    def restore(self, aliases: Iterable[Alias]) -> None:
        """Bring back saved aliases at start. Targets that no longer exist lead nowhere; circular aliases are
        dropped."""
        with self._lock:
            self._swap({alias.name: alias for alias in aliases})
            self._swap({name: it for name, it in self._aliases.items() if name not in self._reachable(name)})

    def refresh(self) -> None:
        """Tell the ledger of holds again which versions must stay, after names were added or removed."""
        with self._lock:
            self._swap(self._aliases)

    def lose(self, version: str) -> None:
        """Enter that a version's copy is gone: aliases that lead to it lead nowhere."""
        with self._lock:
            self._lost |= {version}
            self._swap(self._aliases)

    def regain(self, version: str) -> None:
        """Enter that a lost version could be read again."""
        with self._lock:
            self._lost -= {version}
            self._swap(self._aliases)

    @property
    def held(self) -> frozenset[str]:
        """The versions that must stay because of aliases, as of the last change."""
        return self._registry.holds.assigned(_PARTY, Holder.ALIAS)

    def pinned(self) -> frozenset[str]:
        """The versions that requests can get through an alias, limited to names that are loaded."""
        return self._pinned_by(self._aliases)

    def _pinned_by(self, aliases: Mapping[str, Alias]) -> frozenset[str]:
        targets = (target for alias in aliases.values() for target in alias.now.targets)
        found = frozenset(t.version for t in targets if t.version is not None and self._registry.resolve(t.name))
        return found - self._lost

    def _swap(self, aliases: Mapping[str, Alias]) -> None:
        """Replace the aliases. Readers don't lock, so the registry keeps the versions of the old and the new aliases
        meanwhile."""
        held, holds = self._pinned_by(aliases), self._registry.holds
        self._registry.heed_aliases(frozenset({*aliases, *self._aliases}))
        holds.assign(_PARTY, {Holder.ALIAS: held | self.held})
        self._aliases = MappingProxyType(dict(aliases))
        # An alias keeps the stored copies of all its present and earlier versions.
        earlier = [version for alias in aliases.values() for version in alias.versions]
        holds.assign(_PARTY, {Holder.HISTORY: earlier, Holder.ALIAS: held})
        self._registry.heed_aliases(frozenset(aliases))

    def _found(self, name: str) -> Alias:
        alias = self._aliases.get(name)
        if alias is None:
            raise alias_not_found()
        return alias

    def _check_name(self, name: str) -> None:
        check_name(name)
        if self._registry.is_taken(name):
            problem = f"{name} is an adapter or the base model; choose another name for the alias"
            raise AdapterError(ErrorCode.NAME_TAKEN, problem, "name")

    def _check_target(self, name: str, target: Target) -> None:
        if target.name == name or name in self._reachable(target.name):
            raise _cycle(target.name, name)
        if self._registry.resolve(target.name) is not None:
            return
        if target.name not in self._aliases:
            problem = f"nothing is called {target.name}: load an adapter of that name first"
            raise AdapterError(ErrorCode.TARGET_NOT_FOUND, problem, "split")
        if target.version is not None:
            raise AdapterError(ErrorCode.BAD_TARGET, f"{target.name} is an alias: an alias has no versions", "split")

    def _reachable(self, name: str) -> set[str]:
        """The names of all aliases and adapters that an alias can lead to, whatever the weights."""
        found: set[str] = set()
        open_names = [name]
        while open_names:
            alias = self._aliases.get(open_names.pop())
            names = set() if alias is None else {target.name for target in alias.now.targets} - found
            found |= names
            open_names += names
        return found


def _cycle(target: str, name: str) -> AdapterError:
    return AdapterError(ErrorCode.ALIAS_CYCLE, f"{target} leads to {name}: an alias cannot lead to itself", "split")


def _renamed(alias: Alias, name: str, new: str) -> Alias:
    """The alias after `name` was renamed. A split may lead to a removed alias called `new` as well: the two targets
    become one, with both weights."""

    def fixed(revision: Revision) -> Revision:
        targets: dict[str, Target] = {}
        for target in revision.targets:
            now = replace(target, name=new) if target.name == name and target.version is None else target
            same = targets.get(now.text)
            weight = now.weight if same is None else min(MAX_WEIGHT, same.weight + now.weight)
            targets[now.text] = replace(now, weight=weight)
        return replace(revision, targets=tuple(targets.values()))

    history = tuple(fixed(revision) for revision in alias.history)
    return Alias(new if alias.name == name else alias.name, fixed(alias.now), history)
