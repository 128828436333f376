"""The ledger of host memory: which adapter versions are in it or being read, how many requests hold each of them, and
which is evicted first.

Plain integers and strings: no torch, no clock, no threads. The registry has the copies; `server.adapters.tiers` reads
them from disk. A part of the residency ledger (`ledger`): only that ledger changes this one, others may read it.

How the ledger uses it:

    moves = table.pin(versions)       # holds all of them and returns the reads to make; None: there is no room
    table.read_done(version, ok)      # a read has ended
    table.is_ready(versions)          # all of them are in memory: the request may run
    table.unpin(versions)             # the request ended: exactly once per successful pin

After the last unpin a version stays until another one needs its bytes; the least recently used goes first. A version
that an operator keeps (`keep`) is not evicted for others. A version that was never added (`add`) counts as ready and
takes no bytes.
"""

from collections import Counter
from collections.abc import Iterable

from guanaco.adapters.residency.moves import Evict, Moves, Read


class HostTable:
    """At most `limit_bytes` of adapter versions in host memory; only permanent versions may exceed the limit. The least
    recently used version is evicted first, a pinned one never."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0  # of the versions that are here or being read
        self.num_evictions = 0  # running totals, for metrics
        self.num_reads = 0
        self._sizes: dict[str, int] = {}  # version → bytes, of every version that was added
        self._here: set[str] = set()
        self._reading: set[str] = set()  # their bytes are taken already
        self._permanent: set[str] = set()  # here, and in no store: never evicted for another one
        self._kept: set[str] = set()  # here or being read; an operator keeps them from eviction
        self._pins: Counter[str] = Counter()  # counts above zero only
        self._idle: dict[str, None] = {}  # here, unpinned, evictable; insertion order is least recently used first

    def add(self, version: str, num_bytes: int, *, is_here: bool = False, is_permanent: bool = False) -> bool:
        """Add a version. A known version stays as it is. Returns False, and changes nothing, if there is no room
        beside the versions that may not be evicted.

        is_here: its copy is in memory already, so free bytes must suffice: nothing is evicted for it. is_permanent: the
        copy must also stay, since no store has it; it is added even without room.
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
        """Forget a version that is neither here nor being read."""
        assert version not in self._here | self._reading, f"a version is forgotten while it is here: {version}"
        self._sizes.pop(version, None)

    def pin(self, versions: Iterable[str]) -> Moves | None:
        """Hold every version once more. Returns the moves: others to evict, and the versions to read that are not here.
        Each is read once, however many requests wait for it. A version named twice counts once.

        Returns None, and changes nothing, if there is no room.
        """
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
        """Take back one pin of each version. A version without pins may be evicted, as the most recently used."""
        for version in dict.fromkeys(versions):
            if version not in self._sizes:
                continue
            assert self._pins[version] > 0, f"unpin of a version that is not pinned: {version}"
            self._pins[version] -= 1
            if not self._pins[version]:
                del self._pins[version]
                self._settle(version)

    def keep(self, version: str) -> Moves | None:
        """Keep a version from eviction from now on. Returns the moves, which read it if it is not here; None if there
        is no room."""
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
        """Whether all versions are in host memory. Any thread may ask."""
        return all(version in self._here or version not in self._sizes for version in versions)

    def can_ever_fit(self, versions: Iterable[str], *, beside_others: bool = False) -> bool:
        """Whether these versions fit together when no request holds any other. Any thread may ask.

        beside_others: also leave room for the versions that an operator keeps and for those being read now.
        """
        wanted = set(versions)
        others = self._permanent - wanted
        if beside_others:
            others |= (self._kept | self._reading) - wanted
        return sum(self._sizes.get(version, 0) for version in wanted | others) <= self.limit_bytes

    def read_done(self, version: str, *, is_here: bool) -> None:
        """Enter that a read has ended. is_here False: it failed, its bytes are free again, and the requests that hold
        the version must unpin it."""
        self._reading.discard(version)
        if is_here:
            self._here.add(version)
            self._settle(version)
        else:
            self._kept.discard(version)
            self.num_bytes -= self._sizes[version]

    def evict(self, version: str) -> Moves | None:
        """Evict a copy, even a permanent or kept one. Returns the moves: none if there is no copy. Returns None, and
        changes nothing, if a request holds the version or a read of it runs."""
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
        """The versions that an operator keeps."""
        return frozenset(self._kept)

    def num_pins(self, version: str) -> int:
        """How many requests hold this version."""
        return self._pins.get(version, 0)

    def is_known(self, version: str) -> bool:
        return version in self._sizes

    @property
    def num_evictable_bytes(self) -> int:
        """Bytes that a new version could get: free ones, and those of copies that may be evicted. Any thread may
        ask."""
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
        """Put a version at the end of the eviction order, if it may be evicted at all."""
        is_held = version in self._pins or version in self._permanent or version in self._kept
        if version in self._here and not is_held:
            self._idle.pop(version, None)
            self._idle[version] = None

    def _drop(self, version: str) -> Evict:
        self._here.remove(version)
        self._idle.pop(version, None)
        self.num_bytes -= self._sizes[version]
        return Evict(version, from_host=True)
