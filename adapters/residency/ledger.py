"""Where each adapter version is: on disk, in host memory, on the device. Each change returns the moves that it takes.

The moves must be made in the order in which they are returned, before the next step's forward pass. The caller need not
remember anything else. The ledger's parts are the host table and the slot table. Plain integers and
strings: no torch, no clock, no threads. The scheduler and its simulator call it from one thread; others may only read.

How a scheduler uses it:

    ledger.enter(versions)            # a request that names them is queued
    moves = ledger.hold(versions)     # holds them in host memory and returns the reads; None: there is no room
    moves = ledger.read_done(...)     # a read has ended
    ledger.place(versions)            # the request starts to run: each has an adapter slot, or False
    moves = ledger.step_moves()       # once a step, when it is decided: slots to empty, copies to make
    ledger.unplace(versions)          # it is preempted, or ends
    moves = ledger.leave(versions)    # it ends, wherever it is
"""

from collections import Counter
from collections.abc import Collection, Iterable

from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.messages import AddVersion
from guanaco.adapters.residency.moves import Copy, Evict, Move, Moves
from guanaco.adapters.residency.slot_table import SlotTable


class ResidencyLedger:
    """All adapter versions of one engine. A version that it was never told of (`add`) counts as in host memory."""

    def __init__(self, slots: SlotTable, host: HostTable | None = None) -> None:
        """host: None if all adapters stay in host memory."""
        self.slots = slots
        self.host = host or HostTable(0)
        self._named: Counter[str] = Counter()  # version → unfinished requests that name it; counts above zero only
        self._leaving: set[str] = set()  # to be forgotten as soon as no request names them and no read of them runs

    def add(
        self, version: str, num_bytes: int, device_bytes: int, *, is_here: bool = False, is_permanent: bool = False
    ) -> bool:
        """Add an adapter version, as `HostTable.add` does, with its bytes in the device's arena. Revokes an earlier
        `forget`.

        Returns False if there is no room for it; then it is not added.
        """
        self._leaving.discard(version)
        if self.host.is_known(version):
            return True
        if device_bytes > self.slots.num_bytes:
            return False
        if not self.host.add(version, num_bytes, is_here=is_here, is_permanent=is_permanent):
            return False
        self.slots.set_size(version, device_bytes)
        return True

    def add_version(self, message: AddVersion) -> tuple[bool, Moves]:
        """Carry out an AddVersion: add a version, and keep it in host memory or stop keeping it. Returns whether there
        was room, and the moves."""
        if message.is_kept is False:
            self.unkeep(message.version)
            return True, ()
        if not self.add(message.version, message.num_bytes, message.device_bytes):
            return False, ()
        moves = self.keep(message.version) if message.is_kept else ()
        return moves is not None, moves or ()

    def keep(self, version: str) -> Moves | None:
        """Keep a version in host memory from now on. Returns the moves; None if there is no room."""
        return self._off_device(self.host.keep(version))

    def unkeep(self, version: str) -> None:
        """Take `keep` back."""
        self.host.release(version)

    def forget(self, version: str) -> Moves:
        """Take a version off device and host memory as soon as no request names it. Its last move, now or later, is an
        Evict with `is_forgotten`."""
        self._leaving.add(version)
        return self._finish(version)

    def check_fits(self, versions: Collection[str]) -> None:
        """Raise ValueError, with the numbers, for versions that can never fit together. Any thread may call it."""
        wanted, slots, host = set(versions), self.slots, self.host
        if not slots.can_ever_fit(wanted):
            places = f"{slots.num_slots} slots and {slots.num_bytes} bytes of the device"
            raise ValueError(f"{len(wanted)} adapters in one request: {places} do not hold them")
        if not host.can_ever_fit(wanted):
            raise ValueError(f"{len(wanted)} adapters in one request: {host.limit_bytes} bytes do not hold them")

    def enter(self, versions: Collection[str]) -> None:
        """Enter that an unfinished request names these versions. They are not forgotten before its `leave`."""
        self._named.update(set(versions))

    def hold(self, versions: Collection[str]) -> Moves | None:
        """Hold versions in host memory, each once more. Returns the moves; None, with nothing changed, if there is no
        room."""
        return self._off_device(self.host.pin(versions))

    def leave(self, versions: Collection[str], *, holds: bool) -> Moves:
        """Enter that a request that named these versions has ended. holds: it held them by `hold`. Returns the
        moves."""
        if holds:
            self.host.unpin(versions)
        moves: list[Move] = []
        for version in dict.fromkeys(versions):
            self._named[version] -= 1
            if not self._named[version]:
                del self._named[version]
                moves += self._finish(version)
        return tuple(moves)

    def read_done(self, version: str, *, is_here: bool) -> Moves:
        """Enter that a read has ended. is_here False: it failed, its bytes are free again, and the requests that hold
        the version must `leave`. Returns the moves."""
        self.host.read_done(version, is_here=is_here)
        return self._finish(version)

    def place(self, versions: Collection[str]) -> bool:
        """Give each version an adapter slot and hold it there. Returns False, and changes nothing, if there is no
        room."""
        return self.slots.pin(versions) is not None

    def can_place(self, versions: Collection[str]) -> bool:
        """Whether `place` would find room now."""
        return self.slots.plan(versions) is not None

    def unplace(self, versions: Collection[str]) -> None:
        """Take back one `place`. The versions stay in their slots until others need the slots."""
        self.slots.unpin(versions)

    def slots_of(self, versions: Iterable[str]) -> dict[str, int]:
        """version → adapter slot, sorted by version. All versions must be placed."""
        found = {}
        for version in sorted(set(versions)):
            slot = self.slots.slot_of(version)
            assert slot is not None, "a running sequence's adapter has no slot"
            found[version] = slot
        return found

    def step_moves(self) -> Moves:
        """The slots to empty and the copies to make before the next forward pass."""
        evicted = [Evict(version, slot) for slot, version in self.slots.take_clears()]
        return (*evicted, *(Copy(version, slot) for slot, version in self.slots.take_loads()))

    def copy_failed(self, slot: int) -> None:
        """Enter that a copy could not be made. `step_moves` returns it again as long as a sequence needs the
        version."""
        self.slots.load_failed(slot)

    def is_ready(self, versions: Iterable[str]) -> bool:
        """Whether all versions are in host memory. Any thread may ask."""
        return self.host.is_ready(versions)

    def tier(self, version: str) -> str:
        """`device`, `host` or `disk`: the fastest place that has a version. Any thread may ask."""
        if version in self.slots.resident:
            return "device"
        return "host" if self.host.is_ready([version]) else "disk"

    def check(self) -> None:
        """Assert every invariant; for tests and the simulator."""
        self.host.check()
        self.slots.check()
        assert all(count > 0 for count in self._named.values()), "a count of zero is kept"
        known = [version for version in self.slots.resident if self.host.is_known(version)]
        assert all(self.host.is_ready([version]) for version in known), "on the device, and not in host memory"
        held = [version for version in self._leaving if version in self._named or self.host.is_held(version)]
        assert len(held) == len(self._leaving), "nobody is in the way of a version that is to be forgotten"

    def _finish(self, version: str) -> Moves:
        """Forget a version in `_leaving`, unless a request names it or a read of it runs. Returns the moves."""
        if version not in self._leaving or version in self._named:
            return ()
        evicted = self.host.evict(version)
        if evicted is None:
            return ()
        self._leaving.remove(version)
        slot = self._off_slot(version)
        self.host.remove(version)
        self.slots.set_size(version, 0)
        return (Evict(version, slot, from_host=bool(evicted), is_forgotten=True),)

    def _off_device(self, moves: Moves | None) -> Moves | None:
        """The moves, changed so that a version that leaves host memory leaves its slot, too: on a CPU the slot holds
        the same bytes."""
        if moves is None:
            return None
        return tuple(
            Evict(move.version, self._off_slot(move.version), from_host=True) if isinstance(move, Evict) else move
            for move in moves
        )

    def _off_slot(self, version: str) -> int | None:
        return self.slots.forget(version)
