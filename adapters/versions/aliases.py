"""Names that stand for other names, or for pinned versions of them; one, or several by weight. With their history.

Plain data without tensors: says which adapter a request gets, and keeps what an alias was before. What is loaded is the
registry's to know, and which versions must stay is told to the ledger of holds. Called by the catalog (from any
thread) and the manager.
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
_PARTY = "aliases"  # in the ledger of holds

_TARGET = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(?P<version>[0-9a-f]{6,64}))?")


@dataclass(frozen=True)
class Target:
    """Where an alias leads: whatever `name` stands for, or one version of it."""

    name: str  # an adapter's or another alias's
    version: str | None = None  # the whole digest, once it is in the table
    weight: int = 1

    @property
    def text(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Revision:
    """What an alias was at one time."""

    number: int  # counts an alias's changes, from 1
    changed_at: float  # seconds since the epoch
    targets: tuple[Target, ...]

    def public(self) -> dict[str, Any]:
        """Plain data, for JSON; `split` is what the routes take."""
        split = {target.text: target.weight for target in self.targets}
        return {"revision": self.number, "changed_at": self.changed_at, "split": split}


@dataclass(frozen=True)
class Alias:
    name: str
    now: Revision
    history: tuple[Revision, ...] = ()  # the latest last

    def choose(self, key: str) -> Target:
        """One target, by weight: the same for the same key. A changed weight moves no more keys than it must."""
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
        """The versions that it leads to or led to."""
        revisions = (self.now, *self.history)
        return frozenset(t.version for revision in revisions for t in revision.targets if t.version is not None)

    def versions_of(self, name: str) -> frozenset[str]:
        """The versions of one name that it leads to or led to."""
        revisions = (self.now, *self.history)
        return frozenset(t.version for r in revisions for t in r.targets if t.name == name and t.version is not None)

    def changed(self, targets: tuple[Target, ...], now: float) -> "Alias":
        """With other targets from now on."""
        history = (*self.history, self.now)[-MAX_HISTORY:]
        return Alias(self.name, Revision(self.now.number + 1, now, targets), history)


def parse_targets(split: Mapping[str, int]) -> tuple[Target, ...]:
    """The targets of `{"name" or "name@version": weight}`. Raises AdapterError; versions may still be prefixes."""
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
    """All aliases over one registry. A registered adapter goes before an alias of the same name."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._aliases: MappingProxyType[str, Alias] = MappingProxyType({})
        self._lost: frozenset[str] = frozenset()  # versions whose copies turned out to be damaged or gone

    def get(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def all(self) -> tuple[Alias, ...]:
        return tuple(self._aliases.values())

    def names(self) -> tuple[str, ...]:
        """Those of aliases that no adapter hides."""
        return tuple(name for name in self._aliases if self._registry.resolve(name) is None)

    def follow(self, name: str, key: str) -> Target | None:
        """The adapter (perhaps one that is not loaded) that an alias gives a request of that key; None: no alias."""
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
        """Every adapter that some key may get; each once."""
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
        """From now on `name` leads to `targets`, whose versions are whole and known to the registry.

        expected: the revision that it must have, 0 for none. Raises AdapterError; then nothing changes.
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
        """Forget an alias. Raises AdapterError where there is none."""
        with self._lock:
            alias = self._found(name)
            self._swap({other: it for other, it in self._aliases.items() if other != name})
        return alias

    def rename(self, name: str, new: str) -> Alias:
        """Another name for an alias, here and in all that lead to it, at one moment. Raises AdapterError."""
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
        """Put back what was written down: targets that are gone lead nowhere, and a circle goes. For the start."""
        with self._lock:
            self._swap({alias.name: alias for alias in aliases})
            self._swap({name: it for name, it in self._aliases.items() if name not in self._reachable(name)})

    def refresh(self) -> None:
        """Tell the registry anew what must stay, after names came or went."""
        with self._lock:
            self._swap(self._aliases)

    def lose(self, version: str) -> None:
        """A version can't be had any more: who leads to it leads nowhere."""
        with self._lock:
            self._lost |= {version}
            self._swap(self._aliases)

    def regain(self, version: str) -> None:
        """A version was read again."""
        with self._lock:
            self._lost -= {version}
            self._swap(self._aliases)

    @property
    def held(self) -> frozenset[str]:
        """The versions that stay for aliases, as of the last change."""
        return self._registry.holds.assigned(_PARTY, Holder.ALIAS)

    def pinned(self) -> frozenset[str]:
        """The versions that requests can get by an alias: of names that are loaded."""
        return self._pinned_by(self._aliases)

    def _pinned_by(self, aliases: Mapping[str, Alias]) -> frozenset[str]:
        targets = (target for alias in aliases.values() for target in alias.now.targets)
        found = frozenset(t.version for t in targets if t.version is not None and self._registry.resolve(t.name))
        return found - self._lost

    def _swap(self, aliases: Mapping[str, Alias]) -> None:
        """Readers don't lock: whichever aliases they see, the registry keeps what those lead to."""
        held, holds = self._pinned_by(aliases), self._registry.holds
        self._registry.heed_aliases(frozenset({*aliases, *self._aliases}))
        holds.assign(_PARTY, {Holder.ALIAS: held | self.held})
        self._aliases = MappingProxyType(dict(aliases))
        # The stored copies stay of all that an alias has now or had before.
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
        """The names of all aliases and adapters that an alias leads to, whatever the weights."""
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
    def fixed(revision: Revision) -> Revision:
        targets = (replace(t, name=new) if t.name == name and t.version is None else t for t in revision.targets)
        return replace(revision, targets=tuple(targets))

    history = tuple(fixed(revision) for revision in alias.history)
    return Alias(new if alias.name == name else alias.name, fixed(alias.now), history)
