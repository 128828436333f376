"""The ledger of holds: what needs each adapter version. It reports when nothing needs a version any more.

Requests, loads, names, aliases and the operator *use* a version: requests may ask for it, so it must stay known.
History and the engine only need its stored copy, for a roll-back or for a read that is still running. Knows no tensors
and no files. The registry owns it; all calls are thread-safe.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum


class Holder(StrEnum):
    """Why a version must stay."""

    REQUEST = "request"  # from the request's first look-up of the name to its end
    LOAD = "load"  # an operator's load, while it runs
    NAME = "name"  # a name stands for the version
    ALIAS = "alias"  # an alias leads to the version
    OPERATOR = "operator"  # pinned in memory
    HISTORY = "history"  # a name or an alias can be rolled back to the version
    ENGINE = "engine"  # the engine knows the version, and may still read it


USERS = frozenset({Holder.REQUEST, Holder.LOAD, Holder.NAME, Holder.ALIAS, Holder.OPERATOR})


def _ignore(version: str) -> None:
    pass


class HoldLedger:
    """Version → number of holds, by kind. Every method is thread-safe."""

    def __init__(self) -> None:
        # Called with a version when its last use ends, and when its last hold ends. The call is made on the thread that
        # ended the hold, perhaps under a lock of that thread, so the function must only pass the event on.
        self.on_free: Callable[[str], None] = _ignore
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Holder]] = {}  # counts above zero only
        self._assigned: dict[tuple[str, Holder], Counter[str]] = {}  # (party, kind) → the versions that it holds

    def take(self, version: str, holder: Holder) -> None:
        """Add one hold to a version."""
        with self._lock:
            self._add(version, holder, 1)

    def give_back(self, version: str, holder: Holder) -> None:
        """End one hold: call it exactly once for each `take`."""
        with self._lock:
            freed = self._remove(version, holder, 1)
        if freed:
            self.on_free(version)

    def assign(self, party: str, wanted: Mapping[Holder, Iterable[str]]) -> None:
        """Make `party` hold exactly these versions, for each kind in `wanted`; its other kinds don't change.

        A version that is named twice is held twice. The change is one step: a version that only moves from one kind to
        another is never free in between.
        """
        freed = []
        with self._lock:
            leaving = []
            for holder, versions in wanted.items():
                before, now = self._assigned.get((party, holder), Counter()), Counter(versions)
                self._assigned[party, holder] = now
                if not now:  # a party that holds nothing leaves no entry behind
                    del self._assigned[party, holder]
                for version, count in (now - before).items():
                    self._add(version, holder, count)
                leaving += [(version, holder, count) for version, count in (before - now).items()]
            for version, holder, count in leaving:
                if self._remove(version, holder, count):
                    freed.append(version)
        for version in dict.fromkeys(freed):
            self.on_free(version)

    def assigned(self, party: str, holder: Holder) -> frozenset[str]:
        """The versions of the last `assign` for this party and kind."""
        return frozenset(self._assigned.get((party, holder), ()))

    def count(self, version: str, holder: Holder) -> int:
        """How many holds of this kind a version has."""
        counts = self._counts.get(version)
        return 0 if counts is None else counts[holder]

    def is_used(self, version: str) -> bool:
        """Whether a version must stay known: it has a hold that is neither history's nor the engine's."""
        with self._lock:
            return self._is_used(version)

    def is_held(self, version: str) -> bool:
        """Whether a version has any hold, so that its stored copy must stay."""
        return version in self._counts

    def held(self, *holders: Holder) -> frozenset[str]:
        """The versions with a hold of one of these kinds; without kinds, with any hold."""
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
        """Remove holds. Returns whether this ended the version's last use or its last hold."""
        counts, was_used = self._counts.get(version, Counter()), self._is_used(version)
        assert counts[holder] >= count, f"a hold is given back once: {holder} of version {version}"
        counts[holder] -= count
        if not counts[holder]:
            del counts[holder]
        if not counts:
            del self._counts[version]
        return not counts or (was_used and not self._is_used(version))
