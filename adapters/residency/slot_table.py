"""The ledger of adapter slots: which version is in which slot and where in the device's arena, how many sequences hold
it, and which is evicted first.

Plain integers and strings: no torch, no clock, no randomness. `slot_store` has the tensors. A part of the residency
ledger (`ledger`): only that ledger changes this one.

How the ledger uses it:

    plan = table.pin(versions)        # a sequence starts: each of its versions gets a slot and a pin; None: no room
    table.slot_of(version)            # any time while it is pinned; constant until the last unpin
    table.take_clears()               # once a step, when the batch is decided: the slots to empty
    loads = table.take_loads()        # … and then the copies to make before the forward pass
    table.unpin(versions)             # the sequence finished, was aborted or preempted: exactly once per successful pin

After the last unpin a version stays in its slot until another one needs the slot or the bytes; the least recently used
goes first. A sequence that gets None stays in the queue. `can_ever_fit` was asked before, so it will run at last.

In the arena, each version takes the bytes of its own rank, in one piece, in the first gap that is large enough. It does
not move while a sequence holds it, since kernels and captured graphs keep addresses. So every gap may be too small for
a version although all gaps together are not. Then versions that no sequence holds are evicted; if that does not help,
the version waits for running sequences. On a CPU nothing is copied, so sizes are zero and only the number of slots
limits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SlotPlan:
    """The slots of versions, and what must change to get them."""

    slots: dict[str, int]  # version → adapter slot, for each version asked for
    loads: tuple[tuple[int, str], ...]  # (slot, version) for those that are not resident yet
    evicted: tuple[str, ...]  # versions that lose their slot; none of them is pinned
    offsets: Mapping[str, int]  # byte offsets in the arena of the versions to load, if they take bytes


class SlotTable:
    """`num_slots` slots, each empty or with one adapter version, and an arena of `num_bytes` for all of them together.
    The least recently used version is evicted first, a pinned one never."""

    def __init__(self, num_slots: int, num_bytes: int = 0) -> None:
        assert num_slots >= 0
        self.num_slots = num_slots
        self.num_bytes = num_bytes
        self.num_evictions = 0  # running totals, for metrics
        self.num_loads = 0
        self._versions: list[str | None] = [None] * num_slots  # the version that belongs in each slot
        self._stored: list[str | None] = [None] * num_slots  # the version that the storage was last told to put there
        self._slots: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # version → bytes of the arena, if it takes any
        self._offsets: dict[str, int] = {}  # version → byte offset in the arena; resident versions only
        self._vacated: dict[int, str] = {}  # slot → the version evicted from it because another needed its bytes
        self._pins: dict[str, int] = {}  # resident versions only, and only counts above zero
        self._unpinned: dict[str, None] = {}  # resident without a pin; insertion order is least recently used first

    def set_size(self, version: str, num_bytes: int) -> None:
        """Set how many bytes of the arena a version takes, before it is first pinned. 0: forget the version's size."""
        assert version not in self._slots, f"a version changes its size while it is resident: {version}"
        self._sizes.pop(version, None)
        if num_bytes:
            self._sizes[version] = num_bytes

    def can_ever_fit(self, versions: Iterable[str]) -> bool:
        """Whether these versions fit together on an idle device. Any thread may ask."""
        wanted = set(versions)
        return len(wanted) <= self.num_slots and sum(self._sizes.get(v, 0) for v in wanted) <= self.num_bytes

    def plan(self, versions: Iterable[str]) -> SlotPlan | None:
        """The plan of `pin(versions)`, without carrying it out. None if pinned versions leave too little room."""
        wanted = list(dict.fromkeys(versions))
        missing = [version for version in wanted if version not in self._slots]
        if not missing:
            return SlotPlan({version: self._slots[version] for version in wanted}, (), (), {})
        idle = [version for version in self._unpinned if version not in wanted]
        plan = self._plan(wanted, missing, idle, 0)
        if plan is None and self._sizes:
            # One of the wanted versions may lie in the gap that another needs. If it has no pin, it may be copied
            # again.
            ours = [version for version in self._unpinned if version in wanted]
            if ours:
                plan = self._plan(wanted, missing + ours, ours + idle, len(ours))
        return plan

    def _plan(self, wanted: list[str], missing: list[str], victims: list[str], least: int) -> SlotPlan | None:
        """A plan for the missing versions that evicts the first of `victims`: at least `least`, and no more than
        needed. None if there is none."""
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
        """Give every version a slot and one more pin. Returns None, and changes nothing, if there is no room.

        A version named twice counts once. `take_loads` later returns the copies that this needs.
        """
        plan = self.plan(versions)
        if plan is None:
            return None
        for version in plan.evicted:
            slot = self._remove(version)
            self.num_evictions += 1
            if version in self._sizes:  # its bytes may soon be overwritten, so it must be copied again
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
        """Take back one pin of each version. A version without pins may be evicted, as the most recently used."""
        for version in dict.fromkeys(versions):
            assert self._pins.get(version, 0) > 0, f"unpin of a version that is not pinned: {version}"
            self._pins[version] -= 1
            if self._pins[version] == 0:
                del self._pins[version]
                self._unpinned[version] = None

    def take_clears(self) -> tuple[tuple[int, str], ...]:
        """(slot, version) of the slots that became empty, with the versions that were in them. Each is returned
        once."""
        vacated, self._vacated = self._vacated, {}
        return tuple(sorted((slot, version) for slot, version in vacated.items() if self._versions[slot] is None))

    def take_loads(self) -> tuple[tuple[int, str], ...]:
        """The (slot, version) copies that must be made before the next forward pass. Each is returned once.

        There is one for each slot, so a slot that changed twice within a step is copied once, with its present version.
        Only pinned versions are copied: a copy that failed is not tried again when no sequence holds the version.
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
        """Enter that a copy failed: the slot's content is unknown. `take_loads` returns it again while it is pinned."""
        self._stored[slot] = None

    def forget(self, version: str) -> int | None:
        """Drop a version that is not pinned. Returns the slot that it had, which the storage must clear; None if the
        version had no slot."""
        assert version not in self._pins, f"forget of a pinned version: {version}"
        if version not in self._slots:
            return None
        slot = self._remove(version)
        self._stored[slot] = None
        return slot

    def slot_of(self, version: str) -> int | None:
        """The adapter slot of a version; None if it has no slot."""
        return self._slots.get(version)

    def offset_of(self, version: str) -> int:
        """The byte offset of a resident version in the arena; 0 if it takes no bytes."""
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
        """version → adapter slot, of all versions that have one. Returns a copy."""
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
        """{version: byte offset in the arena} for the missing versions, each in the first gap that is large enough, in
        the order given. None if one of them fits into no gap. Changes nothing.

        missing: versions to place; one without bytes gets no offset. without: resident versions whose bytes count as
        free. A resident version may be in both lists: then it moves.
        """
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
