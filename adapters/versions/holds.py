"""Who needs each adapter version, in one ledger; and the news that nobody does any more.

Requests, loads, names, aliases and the operator *use* a version: requests may get it, so it stays known. History and
the engine only need its stored copy: a roll-back may ask for it, or a read of it may still run. Knows no tensors and no
files. Kept by the registry; every change of it is thread-safe.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum


class Holder(StrEnum):
    """Why a version must stay."""

    REQUEST = "request"  # from its first look at the name to its end
    LOAD = "load"  # a change that an operator asked for, while it is made
    NAME = "name"  # a name stands for it
    ALIAS = "alias"  # an alias leads to it
    OPERATOR = "operator"  # pinned in memory
    HISTORY = "history"  # a name or an alias can be rolled back to it
    ENGINE = "engine"  # the engine was told of it, and may still read it


USERS = frozenset({Holder.REQUEST, Holder.LOAD, Holder.NAME, Holder.ALIAS, Holder.OPERATOR})


def _ignore(version: str) -> None:
    pass


class HoldLedger:
    """Version → how many hold it, by kind. Any thread may call everything here."""

    def __init__(self) -> None:
        # Called with a version when its last user leaves, and when its last holder does. On the thread of whoever
        # left, perhaps under a lock of its own: it must only pass the news on.
        self.on_free: Callable[[str], None] = _ignore
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Holder]] = {}  # counts above zero only
        self._assigned: dict[tuple[str, Holder], Counter[str]] = {}  # by party and kind: the versions that it holds

    def take(self, version: str, holder: Holder) -> None:
        """Hold a version once more."""
        with self._lock:
            self._add(version, holder, 1)

    def give_back(self, version: str, holder: Holder) -> None:
        """Give one hold back: exactly once for each `take`."""
        with self._lock:
            freed = self._remove(version, holder, 1)
        if freed:
            self.on_free(version)

    def assign(self, party: str, wanted: Mapping[Holder, Iterable[str]]) -> None:
        """From now on `party` holds exactly these versions, by kind; its other kinds stay as they are. A version named
        twice is held twice. At one moment: a version that only changes its kind is never free in between."""
        freed = []
        with self._lock:
            leaving = []
            for holder, versions in wanted.items():
                before, now = self._assigned.get((party, holder), Counter()), Counter(versions)
                self._assigned[party, holder] = now
                for version, count in (now - before).items():
                    self._add(version, holder, count)
                leaving += [(version, holder, count) for version, count in (before - now).items()]
            for version, holder, count in leaving:
                if self._remove(version, holder, count):
                    freed.append(version)
        for version in dict.fromkeys(freed):
            self.on_free(version)

    def assigned(self, party: str, holder: Holder) -> frozenset[str]:
        """The versions that `assign` said last."""
        return frozenset(self._assigned.get((party, holder), ()))

    def count(self, version: str, holder: Holder) -> int:
        """How many of this kind hold a version."""
        counts = self._counts.get(version)
        return 0 if counts is None else counts[holder]

    def is_used(self, version: str) -> bool:
        """Whether a version must stay known: somebody holds it besides history and the engine."""
        with self._lock:
            return self._is_used(version)

    def is_held(self, version: str) -> bool:
        """Whether anybody holds a version, so that its stored copy must stay."""
        return version in self._counts

    def held(self, *holders: Holder) -> frozenset[str]:
        """The versions that one of these kinds holds; without kinds: that anybody does."""
        with self._lock:
            return frozenset(
                version
                for version, counts in self._counts.items()
                if not holders or any(holder in counts for holder in holders)
            )

    def _is_used(self, version: str) -> bool:
        return not USERS.isdisjoint(self._counts.get(version, ()))

    def _add(self, version: str, holder: Holder, count: int) -> None:
        self._counts.setdefault(version, Counter())[holder] += count

    def _remove(self, version: str, holder: Holder, count: int) -> bool:
        """Whether the last user or the last holder left."""
        counts, was_used = self._counts.get(version, Counter()), self._is_used(version)
        assert counts[holder] >= count, f"a hold is given back once: {holder} of version {version}"
        counts[holder] -= count
        if not counts[holder]:
            del counts[holder]
        if not counts:
            del self._counts[version]
        return not counts or (was_used and not self._is_used(version))
