"""The ledger of host memory: which adapter versions are in it, which are being read, who holds them, who goes first.

Plain integers and strings: no torch, no clock, no threads; the copies are the registry's, the reading is
`server.adapters.tiers`'. A part of the ledger of residency (`ledger`), which alone changes it; others may look.

How that uses it:

    moves = table.pin(versions)       # there is room for all of them, or None; those that are away are to be read
    table.is_ready(versions)          # … and have been: the request may run
    table.read_done(version, ok)      # its copy is there, or could not be had
    table.unpin(versions)             # the request ended: exactly once per successful pin

A version stays after the last unpin, most recently used last, until another one needs its bytes; one that an operator
wants kept (`keep`) is not evicted for others. One that the table was
never told of (`add`) is none of its business: it counts as ready, and takes nothing.
"""

from collections import Counter
from collections.abc import Iterable

from guanaco.adapters.residency.moves import Evict, Moves, Read


class HostTable:
    """At most `limit_bytes` of adapter versions in host memory; least recently used first to go, pinned never."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0  # of what is here or being read
        self.num_evictions = 0  # running totals, for metrics
        self.num_reads = 0
        self._sizes: dict[str, int] = {}  # every version that we were told of
        self._here: set[str] = set()
        self._reading: set[str] = set()  # their bytes are taken already
        self._permanent: set[str] = set()  # here, and nowhere else: never evicted for another one
        self._kept: set[str] = set()  # here or being read, and not to be evicted, since an operator says so
        self._pins: Counter[str] = Counter()  # counts above zero only
        self._idle: dict[str, None] = {}  # here, unpinned, evictable; insertion order is least recently used first

    def add(self, version: str, num_bytes: int, *, is_here: bool = False, is_permanent: bool = False) -> bool:
        """Tell of a version; one that is known stays as it is. False, and nothing changed, where there is no room:
        for one that is not here yet, where what is pinned leaves too little.

        is_here: its copy is in memory already. is_permanent: … and must stay, since nothing else has it.
        """
        if version in self._sizes:
            return True
        is_here = is_here or is_permanent
        free = self.limit_bytes - self.num_bytes if is_here else self.num_evictable_bytes
        if num_bytes > free and not is_permanent:
            return False
        self._sizes[version] = num_bytes
        if is_here:
            self.num_bytes += num_bytes
            self._here.add(version)
        if is_permanent:
            self._permanent.add(version)
        elif is_here:
            self._idle[version] = None
        return True

    def remove(self, version: str) -> None:
        """Forget a version that was evicted, or was never here."""
        assert version not in self._here | self._reading, f"a version is forgotten while it is here: {version}"
        self._sizes.pop(version, None)

    def pin(self, versions: Iterable[str]) -> Moves | None:
        """Hold every version once more, or change nothing and return None where there is no room for those that are
        away. Others are evicted for them, and they are to be read, each once however many wait for it. A version named
        twice counts once."""
        wanted = [version for version in dict.fromkeys(versions) if version in self._sizes]
        missing = [version for version in wanted if version not in self._here and version not in self._reading]
        needed = self.num_bytes + sum(self._sizes[version] for version in missing) - self.limit_bytes
        victims = []
        if missing and needed > 0:
            for version in self._idle:
                if needed <= 0:
                    break
                if version not in wanted:
                    victims.append(version)
                    needed -= self._sizes[version]
            if needed > 0:
                return None
        evicted = [self._drop(version) for version in victims]
        self.num_evictions += len(evicted)
        self.num_reads += len(missing)
        for version in missing:
            self._reading.add(version)
            self.num_bytes += self._sizes[version]
        for version in wanted:
            self._pins[version] += 1
            self._idle.pop(version, None)
        return (*evicted, *(Read(version) for version in missing))

    def unpin(self, versions: Iterable[str]) -> None:
        """Take back one pin of each version; one that has none left becomes the most recently used to evict."""
        for version in dict.fromkeys(versions):
            if version not in self._sizes:
                continue
            assert self._pins[version] > 0, f"unpin of a version that is not pinned: {version}"
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]
                self._settle(version)

    def keep(self, version: str) -> Moves | None:
        """From now on a version is not evicted for others; one that is away is read. None where there is no room."""
        if version not in self._sizes:
            return ()
        moves = self.pin([version])
        if moves is not None:
            self._kept.add(version)
            self.unpin([version])
        return moves

    def release(self, version: str) -> None:
        """Take `keep` back."""
        self._kept.discard(version)
        self._settle(version)

    def is_ready(self, versions: Iterable[str]) -> bool:
        """Whether a copy of each is in memory. Any thread may ask."""
        return all(version in self._here or version not in self._sizes for version in versions)

    def can_ever_fit(self, versions: Iterable[str], *, beside_others: bool = False) -> bool:
        """Whether these versions fit at the same time when nobody else holds any. Any thread may ask.

        beside_others: … while what an operator keeps stays, and what is being read now still is.
        """
        wanted = set(versions)
        others = self._permanent - wanted
        if beside_others:
            others |= (self._kept | self._reading) - wanted
        return sum(self._sizes.get(version, 0) for version in wanted | others) <= self.limit_bytes

    def read_done(self, version: str, *, is_here: bool) -> None:
        """A read has ended; with `is_here` False its bytes are free again, and whoever holds it must let go."""
        self._reading.discard(version)
        if is_here:
            self._here.add(version)
            self._settle(version)
        else:
            self._kept.discard(version)
            self.num_bytes -= self._sizes[version]

    def evict(self, version: str) -> Moves | None:
        """Let a copy go, permanent, kept or not; None where somebody holds it or it is being read."""
        if self.is_held(version):
            return None
        if version not in self._here:
            return ()
        self._permanent.discard(version)
        self._kept.discard(version)
        return (self._drop(version),)

    def is_held(self, version: str) -> bool:
        """Whether a request holds a version, or a read of it runs."""
        return version in self._pins or version in self._reading

    @property
    def kept(self) -> frozenset[str]:
        """What an operator wants kept, and is."""
        return frozenset(self._kept)

    def num_pins(self, version: str) -> int:
        """How many requests hold this version."""
        return self._pins.get(version, 0)

    def is_known(self, version: str) -> bool:
        return version in self._sizes

    @property
    def num_evictable_bytes(self) -> int:
        """Bytes that a new version could have: free ones, and those of copies that nobody holds. Any thread may ask."""
        return self.limit_bytes - self.num_bytes + sum(self._sizes.get(version, 0) for version in list(self._idle))

    def check(self) -> None:
        """Assert every invariant of the ledger; for tests and the simulator."""
        assert not self._here & self._reading, "a version is here and being read"
        assert self._here | self._reading <= self._sizes.keys(), "a version without a size"
        assert self.num_bytes == sum(self._sizes[version] for version in self._here | self._reading), "bytes"
        assert all(count > 0 for count in self._pins.values()), "a pin count of zero is kept"
        assert set(self._idle) == self._here - self._pins.keys() - self._permanent - self._kept, "who may be evicted"
        assert self._here | self._reading >= self._kept, "a version that is to stay is away"
        assert self._pins.keys() <= self._here | self._reading, "a pinned version is neither here nor being read"
        permanent = sum(self._sizes[version] for version in self._permanent)
        assert self.num_bytes <= max(self.limit_bytes, permanent), "more bytes than there may be"

    def _settle(self, version: str) -> None:
        """Now the most recently used that may be evicted, if it may be at all."""
        is_held = version in self._pins or version in self._permanent or version in self._kept
        if version in self._here and not is_held:
            self._idle.pop(version, None)
            self._idle[version] = None

    def _drop(self, version: str) -> Evict:
        self._here.remove(version)
        self._idle.pop(version, None)
        self.num_bytes -= self._sizes[version]
        return Evict(version, from_host=True)
