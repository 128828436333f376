"""The adapters of a simulated world: names that come to stand for other versions, removals that wait for whoever runs,
and a store whose reads take time, fail or hang. Knows what must be in memory, and checks that no more is.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

from guanaco.adapters.residency.messages import AddVersion, ForgetVersion, ReadDone
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.scheduler import Scheduler

BROKEN = "adapter_broken"
_LONGEST_READ = 8  # steps; one that hangs takes so many times more
_HANGS = 20


class SimulatedAdapters:
    """An `AdapterSource`, and what an operator does. `is_used` says whether a client holds a version."""

    def __init__(
        self,
        random: Random,
        scheduler: Scheduler,
        num_names: int,
        *,
        room: int,
        fault_chance: float,
        is_used: Callable[[str], bool],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.fault_chance = fault_chance
        self.keeps = True  # whether the operator pins adapters now and then
        self.failed: set[str] = set()  # versions whose read failed since the last step
        self._random = random
        self._scheduler = scheduler
        self._host = scheduler.residency.host
        self._room = room
        self._is_used = is_used
        self._sizes: dict[str, int] = {}
        self._memory: set[str] = set()
        self._reading: dict[str, int] = {}  # version → steps until it is read
        self._retired: set[str] = set()  # to be forgotten; the engine was told of `_told`
        self._told: set[str] = set()
        self._num_made = 0
        self._names: dict[int, str] = {}
        for name in range(num_names):
            self._name(name, is_permanent=random.random() < 0.1)

    # the engine's side

    def start(self, version: str) -> None:
        assert version not in self._reading, "read twice at once"
        assert version not in self._memory, "read although it is in memory"
        slow = self._random.random() < self.fault_chance
        self._reading[version] = self._random.randint(0, _LONGEST_READ) * (_HANGS if slow else 1)
        self.counts["reads"] += 1

    def drop(self, version: str) -> None:
        self._memory.remove(version)
        self.counts["evictions"] += 1

    def gone(self, version: str) -> None:
        """A removed version goes when its last client has; never before."""
        assert version in self._told, "a version goes that nobody removed"
        assert version not in self._memory | self._reading.keys(), "a removed version stays in memory"
        assert version not in self._scheduler.residency.slots.resident, "a removed version stays on the device"
        open_sequences = self._scheduler._sequences.values()
        assert not any(version in sequence.versions for sequence in open_sequences), "it goes while it is used"
        self._retired.remove(version)
        self._told.remove(version)
        del self._sizes[version]
        self.counts["forgotten"] += 1

    def check_loaded(self, version: str) -> None:
        """A version goes to the device: it must be in memory."""
        is_there = version in self._memory or version not in self._sizes  # one of a test's own needs no memory
        assert is_there, "a version goes to the device that is not in memory"

    # the world's side

    @property
    def versions(self) -> list[str]:
        """What the names stand for now."""
        return list(self._names.values())

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    def fit_together(self, versions: Iterable[str]) -> bool:
        slots = self._scheduler.residency.slots
        on_device = 3 * sum(self._sizes.get(version, 0) for version in set(versions))
        return self._host.can_ever_fit(versions) and (not slots.num_bytes or on_device <= slots.num_bytes)

    def happen(self, engine: Engine) -> None:
        """What an operator does between two steps, and the reads that end."""
        random = self._random
        for version, left in list(self._reading.items()):
            self._reading[version] = left - 1
            if left <= 0:
                del self._reading[version]
                self._end_read(engine, version, fails=random.random() < self.fault_chance)
        if random.random() < 0.05:
            name = random.randrange(len(self._names) or 1)
            if name in self._names:
                self._retire(self._names.pop(name))
                self.counts["removed or replaced"] += 1
            self._name(name, engine)
        if self.keeps and random.random() < 0.03:  # at most one is kept: the others must have room
            versions = sorted(v for v in self._names.values() if 2 * self._sizes[v] <= self._room - 4)
            kept = frozenset(random.sample(versions, min(len(versions), random.randrange(2))))
            self.counts["kept"] += self.keep(engine, kept) and bool(kept)
        for version in sorted(self._retired - self._told):
            self._told.add(version)
            engine.handle(ForgetVersion(version))
        for version in self._retired:
            assert self._is_used(version) or version in self._reading, "a version that nobody uses cannot be removed"

    def keep(self, engine: Engine, versions: frozenset[str]) -> bool:
        """An operator wants these kept and no others; whether there was room for all of them."""
        released = [AddVersion(version, 0, is_kept=False) for version in sorted(self._host.kept - versions)]
        kept = [AddVersion(version, self._sizes[version], is_kept=True) for version in sorted(versions)]
        return all(engine.handle(*released, *kept))

    def check(self, on_device: Iterable[str]) -> None:
        """Between two steps: memory holds what the ledger says, no more than there may be, and all that is on the
        device: on a CPU they are the same bytes."""
        host, here = self._host, self._memory
        assert {version for version in self._sizes if host.is_known(version) and host.is_ready([version])} == here
        taken = sum(self._sizes[version] for version in here | self._reading.keys())
        assert taken == host.num_bytes <= self._room, "more bytes in memory than there may be"
        assert here.issuperset(set(on_device) & self._sizes.keys()), "a version left memory and not the device"
        assert self._sizes.keys() >= self._retired, "forgotten too early"

    def _name(self, name: int, engine: Engine | None = None, *, is_permanent: bool = False) -> None:
        """Have a name stand for a new version, or for one that another name or an earlier time had."""
        known = sorted(self._sizes)
        if known and self._random.random() < 0.2:
            version = self._random.choice(known)
            if version in self._told:
                assert engine is not None
                self._told.remove(version)
                engine.handle(AddVersion(version, self._sizes[version]))
            self._retired.discard(version)
            self._names[name] = version
            return
        version, size = f"v{self._num_made}", self._random.randint(1, 4)
        self._num_made += 1
        device_bytes = 3 * size if self._scheduler.residency.slots.num_bytes else 0
        is_permanent = is_permanent and 2 * size < self._room
        if not self._scheduler.residency.add(version, size, device_bytes, is_permanent=is_permanent):
            self.counts["no room"] += 1
            return
        if self._host.is_ready([version]):
            self._memory.add(version)
        self._sizes[version] = size
        self._names[name] = version

    def _retire(self, version: str) -> None:
        if version not in self._names.values():
            self._retired.add(version)

    def _end_read(self, engine: Engine, version: str, *, fails: bool) -> None:
        if fails:
            self.failed.add(version)
            self.counts["failed reads"] += 1
        else:
            self._memory.add(version)
        engine.handle(ReadDone(version, BROKEN if fails else None))
