"""The ledger of device places: which adapter version is in which adapter slot, and where in the device's arena; who
holds it, and who goes first.

Plain integers and strings: no torch, no clock, no randomness; the tensors are `slot_store`'s. A part of the ledger of
residency (`ledger`), which alone changes it.

How that uses it:

    plan = table.pin(versions)        # a sequence starts to run: all of its versions get a place and a pin, or None
    table.slot_of(version)            # any time while it is pinned; constant until the last unpin
    table.take_clears()               # once a step, when the batch is decided: slots to empty, and then
    loads = table.take_loads()        # copies to make before the forward pass
    table.unpin(versions)             # the sequence finished, was aborted or preempted: exactly once per successful pin

A version stays in its slot after the last unpin, most recently used last, until another one needs the place or the
bytes. A sequence that gets None simply stays in the queue; whether it could ever run is `can_ever_fit`, asked at
admission.

Bytes are exact to the rank: each version lies in one piece, in the first gap that is large enough, and does not move
while anybody holds it (kernels and captured graphs keep addresses). So gaps may be too small for a version although
all of them together are not; then those are evicted that nobody holds, and where that does not help it waits for those
that run. On a device that is the host (a CPU) nothing is copied: there no sizes are told, and only places count.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SlotPlan:
    """Where versions are or would be, and what that takes."""

    slots: dict[str, int]  # version → adapter slot, for each version asked for
    loads: tuple[tuple[int, str], ...]  # (slot, version) for those that are not resident yet
    evicted: tuple[str, ...]  # versions that lose their place for it; none of them is pinned
    offsets: Mapping[str, int]  # where those that are not resident yet are to lie in the arena, if they take bytes


class SlotTable:
    """`num_slots` places, each empty or holding one adapter version, and an arena of `num_bytes` for all of them
    together; least recently used first to go, pinned never."""

    def __init__(self, num_slots: int, num_bytes: int = 0) -> None:
        assert num_slots >= 0
        self.num_slots = num_slots
        self.num_bytes = num_bytes
        self.num_evictions = 0  # running totals, for metrics
        self.num_loads = 0
        self._versions: list[str | None] = [None] * num_slots  # what belongs in each slot
        self._stored: list[str | None] = [None] * num_slots  # what the storage has been told to put there
        self._slots: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # of the versions that take bytes of the arena
        self._offsets: dict[str, int] = {}  # where they lie in it: resident ones only
        self._vacated: dict[int, str] = {}  # slots that lost their version to another one's bytes → that version
        self._pins: dict[str, int] = {}  # resident versions only, and only counts above zero
        self._unpinned: dict[str, None] = {}  # resident without a pin; insertion order is least recently used first

    def set_size(self, version: str, num_bytes: int) -> None:
        """Tell how many bytes of the arena a version takes, before it is pinned for the first time; 0: forget it."""
        assert version not in self._slots, f"a version changes its size while it is resident: {version}"
        self._sizes.pop(version, None)
        if num_bytes:
            self._sizes[version] = num_bytes

    def can_ever_fit(self, versions: Iterable[str]) -> bool:
        """Whether these versions fit at the same time on an idle device. Any thread may ask."""
        wanted = set(versions)
        return len(wanted) <= self.num_slots and sum(self._sizes.get(v, 0) for v in wanted) <= self.num_bytes

    def plan(self, versions: Iterable[str]) -> SlotPlan | None:
        """What `pin(versions)` would do now, without doing it; None where too many slots are pinned by others."""
        wanted = list(dict.fromkeys(versions))
        missing = [version for version in wanted if version not in self._slots]
        if not missing:
            return SlotPlan({version: self._slots[version] for version in wanted}, (), (), {})
        idle = [version for version in self._unpinned if version not in wanted]
        plan = self._plan(wanted, missing, idle, 0)
        if plan is None and self._sizes:
            # One of our own may lie where another one needs the gap. If nobody else holds it, it may be copied again.
            ours = [version for version in self._unpinned if version in wanted]
            if ours:
                plan = self._plan(wanted, missing + ours, ours + idle, len(ours))
        return plan

    def _plan(self, wanted: list[str], missing: list[str], victims: list[str], least: int) -> SlotPlan | None:
        """Places for the missing versions if the first of `victims` go, at least so many and no more than need be."""
        empty = [slot for slot, version in enumerate(self._versions) if version is None]
        num_victims = max(least, len(missing) - len(empty))
        while True:
            if num_victims > len(victims):
                return None
            evicted = victims[:num_victims]
            offsets = self._lay_out(missing, without=evicted)
            if offsets is not None:
                break
            num_victims += 1
        places = empty + [self._slots[victim] for victim in evicted]
        loads = tuple((slot, version) for slot, version in zip(places, missing, strict=False))
        slots = {version: self._slots[version] for version in wanted if version not in missing}
        slots.update({version: slot for slot, version in loads})
        return SlotPlan(slots=slots, loads=loads, evicted=tuple(evicted), offsets=offsets)

    def pin(self, versions: Iterable[str]) -> SlotPlan | None:
        """Give every version a place and one more pin each, or change nothing and return None.

        A version named twice counts once. The slots that need a copy are also remembered for `take_loads`.
        """
        plan = self.plan(versions)
        if plan is None:
            return None
        for version in plan.evicted:
            slot = self._remove(version)
            self.num_evictions += 1
            if version in self._sizes:  # others' bytes may soon be where its own were: it must be copied again
                self._stored[slot] = None
                self._vacated[slot] = version
        for slot, version in plan.loads:
            self._versions[slot] = version
            self._slots[version] = slot
        self._offsets.update(plan.offsets)
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

    def take_clears(self) -> tuple[tuple[int, str], ...]:
        """Slots that are empty now and were not, with what was in them: each is handed out once."""
        vacated, self._vacated = self._vacated, {}
        return tuple(sorted((slot, version) for slot, version in vacated.items() if self._versions[slot] is None))

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

    def offset_of(self, version: str) -> int:
        """Where a resident version lies in the arena; 0 for one that takes no bytes."""
        return self._offsets.get(version, 0)

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that resident versions take. Any thread may ask."""
        return sum(self._sizes.get(version, 0) for version in list(self._offsets))

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
        assert self._offsets.keys() == self._sizes.keys() & self._slots.keys(), "a version without a piece, or none's"
        end = 0
        for offset, size in sorted((offset, self._sizes[version]) for version, offset in self._offsets.items()):
            assert offset >= end, "two versions share bytes of the arena"
            end = offset + size
        assert end <= self.num_bytes, "a version lies beyond the arena"

    def _lay_out(self, missing: list[str], without: list[str]) -> dict[str, int] | None:
        """First fit of the missing versions among the resident ones, but for some; None where one finds no gap."""
        taken = {offset: self._sizes[version] for version, offset in self._offsets.items() if version not in without}
        offsets = {}
        for version in missing:
            size = self._sizes.get(version, 0)
            if not size:
                continue
            end = 0
            for offset in sorted(taken):
                if offset - end >= size:
                    break
                end = offset + taken[offset]
            if end + size > self.num_bytes:
                return None
            taken[end] = size
            offsets[version] = end
        return offsets

    def _remove(self, version: str) -> int:
        slot = self._slots.pop(version)
        self._versions[slot] = None
        self._offsets.pop(version, None)
        del self._unpinned[version]
        return slot
