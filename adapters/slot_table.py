"""The ledger of device places: which adapter version is in which adapter slot, who holds it, who goes first.

Plain integers and strings: no torch, no clock, no randomness; the tensors are `slot_store`'s. Called by the scheduler
and its simulator, from one thread.

How a scheduler uses it:

    plan = table.pin(versions)        # a sequence starts to run: all of its versions get a place and a pin, or None
    table.slot_of(version)            # any time while it is pinned; constant until the last unpin
    loads = table.take_loads()        # once a step, when the batch is decided: copies to make before the forward pass
    table.unpin(versions)             # the sequence finished, was aborted or preempted: exactly once per successful pin

A version stays in its slot after the last unpin, most recently used last, until another one needs the place. A
sequence that gets None simply stays in the queue; whether it could ever run is `can_ever_fit`, asked at admission.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SlotPlan:
    """Where versions are or would be, and what that takes."""

    slots: dict[str, int]  # version → adapter slot, for each version asked for
    loads: tuple[tuple[int, str], ...]  # (slot, version) for those that are not resident yet
    evicted: tuple[str, ...]  # versions that lose their place for it; none of them is pinned


class SlotTable:
    """`num_slots` places, each empty or holding one adapter version; least recently used first to go, pinned never."""

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 0
        self.num_slots = num_slots
        self.num_evictions = 0  # running totals, for metrics
        self.num_loads = 0
        self._versions: list[str | None] = [None] * num_slots  # what belongs in each slot
        self._stored: list[str | None] = [None] * num_slots  # what the storage has been told to put there
        self._slots: dict[str, int] = {}
        self._pins: dict[str, int] = {}  # resident versions only, and only counts above zero
        self._unpinned: dict[str, None] = {}  # resident without a pin; insertion order is least recently used first

    def can_ever_fit(self, versions: Iterable[str]) -> bool:
        """Whether these versions fit at the same time on an idle device."""
        return len(set(versions)) <= self.num_slots

    def plan(self, versions: Iterable[str]) -> SlotPlan | None:
        """What `pin(versions)` would do now, without doing it; None where too many slots are pinned by others."""
        wanted = list(dict.fromkeys(versions))
        missing = [version for version in wanted if version not in self._slots]
        empty = [slot for slot, version in enumerate(self._versions) if version is None] if missing else []
        num_victims = len(missing) - len(empty)
        victims: list[str] = []
        if num_victims > 0:
            victims = [version for version in self._unpinned if version not in wanted][:num_victims]
            if len(victims) < num_victims:
                return None
        places = empty + [self._slots[victim] for victim in victims]
        loads = tuple((slot, version) for slot, version in zip(places, missing, strict=False))
        slots = {version: self._slots[version] for version in wanted if version in self._slots}
        slots.update({version: slot for slot, version in loads})
        return SlotPlan(slots=slots, loads=loads, evicted=tuple(victims))

    def pin(self, versions: Iterable[str]) -> SlotPlan | None:
        """Give every version a place and one more pin each, or change nothing and return None.

        A version named twice counts once. The slots that need a copy are also remembered for `take_loads`.
        """
        plan = self.plan(versions)
        if plan is None:
            return None
        for version in plan.evicted:
            self._remove(version)
            self.num_evictions += 1
        for slot, version in plan.loads:
            self._versions[slot] = version
            self._slots[version] = slot
        for version in plan.slots:
            self._pins[version] = self._pins.get(version, 0) + 1
            self._unpinned.pop(version, None)
        return plan

    def unpin(self, versions: Iterable[str]) -> None:
        """Take back one pin of each version; one that has none left becomes the most recently used to evict."""
        for version in dict.fromkeys(versions):
            assert self._pins.get(version, 0) > 0, f"unpin of a version that is not pinned: {version}"
            self._pins[version] -= 1
            if self._pins[version] == 0:
                del self._pins[version]
                self._unpinned[version] = None

    def take_loads(self) -> tuple[tuple[int, str], ...]:
        """The (slot, version) copies that must happen before the next forward pass; each is handed out once.

        By slot, so that a place that changed hands twice within one step is copied once, with what it holds now. Only
        for versions that are pinned: one that failed and that nobody holds any more is not tried again in every step.
        """
        loads = tuple(
            (slot, version)
            for slot, version in enumerate(self._versions)
            if version is not None and version != self._stored[slot] and version in self._pins
        )
        for slot, version in loads:
            self._stored[slot] = version
        self.num_loads += len(loads)
        return loads

    def load_failed(self, slot: int) -> None:
        """The storage could not make this copy: the slot's content is unknown, and is handed out again if wanted."""
        self._stored[slot] = None

    def forget(self, version: str) -> int | None:
        """Drop a version that nothing pins (it was removed); returns the slot it had, for the storage to clear."""
        assert version not in self._pins, f"forget of a pinned version: {version}"
        if version not in self._slots:
            return None
        slot = self._remove(version)
        self._stored[slot] = None
        return slot

    def slot_of(self, version: str) -> int | None:
        """The adapter slot of a version; None where it has none."""
        return self._slots.get(version)

    def num_pins(self, version: str) -> int:
        """How many sequences hold this version."""
        return self._pins.get(version, 0)

    @property
    def resident(self) -> dict[str, int]:
        """version → adapter slot, of all that have a place; a copy."""
        return dict(self._slots)

    def check(self) -> None:
        """Assert every invariant of the ledger; for tests and the simulator."""
        by_slot = {version: slot for slot, version in enumerate(self._versions) if version is not None}
        assert by_slot == self._slots, "a version is in two slots, or the two directions disagree"
        assert sum(version is not None for version in self._versions) == len(self._slots), "a slot is listed twice"
        assert all(count > 0 for count in self._pins.values()), "a pin count of zero is kept"
        assert set(self._pins) | set(self._unpinned) == set(self._slots), "a resident version is in neither list"
        assert not set(self._pins) & set(self._unpinned), "a pinned version could be evicted"

    def _remove(self, version: str) -> int:
        slot = self._slots.pop(version)
        self._versions[slot] = None
        del self._unpinned[version]
        return slot
