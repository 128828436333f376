"""The ledger of host memory against a slow model of it: any order of pins, reads that fail, evictions and removals."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.moves import Evict, Read

SIZES = {f"v{i}": size for i, size in enumerate((10, 10, 25, 40, 5, 60))}
VERSIONS = st.sampled_from(list(SIZES))


class HostTableMachine(RuleBasedStateMachine):
    """A list in order of use is the model of who goes first; what was handed out is what is really in memory."""

    @initialize(limit=st.integers(0, 120), permanent=st.booleans())
    def start(self, limit, permanent):
        self.table = HostTable(limit)
        self.held = []  # one tuple of versions per request
        self.used = []  # in memory as the ledger has it, least recently used first
        self.reading = set()
        self.memory = set()  # what really is there
        self.started = set()
        self.moves = []  # to be made, sooner or later
        self.permanent = set()
        self.kept = set()  # by an operator
        if permanent and limit >= SIZES["v0"]:
            self.table.add("v0", SIZES["v0"], is_permanent=True)
            self.permanent, self.used, self.memory = {"v0"}, ["v0"], {"v0"}
        for version, size in SIZES.items():
            self.table.add(version, size)

    def pins(self):
        return Counter(version for versions in self.held for version in set(versions))

    def bytes(self, versions):
        return sum(SIZES[version] for version in versions)

    def move(self):
        moves, self.moves = self.moves, []
        for move in moves:
            if isinstance(move, Evict):
                self.memory.remove(move.version)
            else:
                assert move.version not in self.started, "read twice at once"
                self.started.add(move.version)

    @rule(versions=st.lists(VERSIONS, max_size=3), now=st.booleans())
    def pin(self, versions, now):
        versions = [version for version in versions if self.table.is_known(version)]
        if self.bring(versions, self.table.pin):
            self.held.append(tuple(versions))
        if now:
            self.move()

    @rule(version=VERSIONS)
    def keep(self, version):
        if version in self.kept:
            self.table.release(version)
            self.kept.remove(version)
            self.renew(version)
        elif self.table.is_known(version) and self.bring([version], lambda versions: self.table.keep(*versions)):
            self.kept.add(version)
            self.renew(version)

    def bring(self, versions, into):
        """Have versions held by `into`: whether there is room, and who goes for it, must be as this says."""
        missing = set(versions) - set(self.used) - self.reading
        idle = [v for v in self.used if v not in self.pins() and v not in versions]
        idle = [version for version in idle if version not in self.permanent | self.kept]
        needed = self.bytes({*self.used, *self.reading, *missing}) - self.table.limit_bytes
        evicted = []
        while missing and needed > 0 and idle:
            evicted.append(idle.pop(0))
            needed -= SIZES[evicted[-1]]
        fits = not missing or needed <= 0
        moves = into(versions)
        assert (moves is not None) is fits
        self.moves += moves or ()
        if fits:
            self.used = [v for v in self.used if v not in evicted]
            self.reading |= missing
        return fits

    @rule()
    def later(self):
        self.move()

    @precondition(lambda self: self.started)
    @rule(data=st.data(), good=st.booleans())
    def read(self, data, good):
        version = data.draw(st.sampled_from(sorted(self.started)))
        self.move()
        self.started.remove(version)
        self.reading.remove(version)
        if good:
            self.memory.add(version)
            self.used.append(version)
        self.table.read_done(version, is_here=good)
        if not good:  # whoever waits for it ends
            self.kept.discard(version)
            for versions in [held for held in self.held if version in held]:
                self.held.remove(versions)
                self.let_go(versions)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data):
        self.let_go(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    def let_go(self, versions):
        self.table.unpin(versions)
        for version in dict.fromkeys(versions):
            self.renew(version)

    def renew(self, version):
        """Nobody holds it any more: from now on it is the most recently used."""
        if version in self.used and version not in self.pins():
            self.used.remove(version)
            self.used.append(version)

    @rule(version=VERSIONS)
    def remove(self, version):
        if not self.table.is_known(version):
            assert self.table.add(version, SIZES[version]) is (SIZES[version] <= self.table.num_evictable_bytes)
            return
        moves = self.table.evict(version)
        assert (moves is not None) is (version not in self.pins() and version not in self.reading)
        if moves is not None:
            self.moves += moves
            self.used = [v for v in self.used if v != version]
            self.permanent.discard(version)
            self.kept.discard(version)
            self.move()
            self.table.remove(version)

    @invariant()
    def holds(self):
        if not hasattr(self, "table"):
            return
        self.table.check()
        assert self.table.kept == self.kept
        pins = self.pins()
        assert all(self.table.num_pins(version) == pins[version] for version in SIZES)
        known = [version for version in SIZES if self.table.is_known(version)]
        assert [v for v in known if self.table.is_ready([v])] == [v for v in known if v in self.used]
        assert self.bytes(self.used) + self.bytes(self.reading) == self.table.num_bytes
        ready = {version for version in pins if self.table.is_ready([version])}
        evicted = {move.version for move in self.moves if isinstance(move, Evict)}
        assert ready <= self.memory | evicted, "a held version is not really there"
        if not evicted:
            assert self.memory == set(self.used)

    def teardown(self):
        for versions in getattr(self, "held", []):
            self.table.unpin(versions)
        if hasattr(self, "table"):
            assert not self.table._pins


def test_host_table_follows_its_model(proof_count):
    count = proof_count(80, 1000)
    machine = settings(max_examples=count, stateful_step_count=50, deadline=None, derandomize=True)
    run_state_machine_as_test(HostTableMachine, settings=machine)


def table_of(limit, **sizes):
    table = HostTable(limit)
    for version, size in sizes.items():
        assert table.add(version, size)
    return table


def bring(table, *versions):
    for move in table.pin(versions):
        if isinstance(move, Read):
            table.read_done(move.version, is_here=True)
    table.unpin(versions)


def moves_of(evicted="", read=""):
    return (*(Evict(version, from_host=True) for version in evicted), *(Read(version) for version in read))


def test_the_least_recently_used_goes_first():
    table = table_of(30, a=10, b=10, c=10, d=20)
    bring(table, "a")
    bring(table, "b")
    bring(table, "c")
    bring(table, "a")
    assert table.pin(["d"]) == moves_of("bc", "d")
    assert table.num_evictions == 2
    assert table.is_ready(["a"])
    assert not table.is_ready(["a", "d"])


def test_a_version_that_several_wait_for_is_read_once():
    table = table_of(30, a=10)
    assert table.pin(["a"]) == moves_of(read="a")
    assert table.pin(["a"]) == ()
    table.read_done("a", is_here=True)
    assert table.pin(["a"]) == ()
    assert table.num_pins("a") == 3


def test_all_or_nothing():
    """Two requests that each got the half of what they need would wait for each other for ever."""
    table = table_of(20, a=10, b=10, c=10, d=10)
    assert table.pin(["a", "b"])
    assert table.pin(["c", "d"]) is None
    assert table.pin(["a", "c"]) is None
    assert table.num_pins("a") == 1
    assert table.can_ever_fit(["c", "d"])
    assert not table.can_ever_fit(["a", "c", "d"])
    assert not table.can_ever_fit(["c"], beside_others=True)


def test_a_read_without_a_waiter_leaves_a_copy_that_can_go():
    table = table_of(10, a=10, b=10)
    assert table.pin(["a"]) == moves_of(read="a")
    table.unpin(["a"])
    assert table.pin(["b"]) is None, "its bytes are taken until the read ends"
    assert table.evict("a") is None
    table.read_done("a", is_here=True)
    assert table.pin(["b"]) == moves_of("a", "b")


def test_what_only_memory_has_is_not_evicted_but_can_be_forgotten():
    table = HostTable(20)
    assert table.add("a", 15, is_permanent=True)
    assert not table.add("b", 6), "beside it there is never room"
    assert table.add("c", 5)
    assert table.pin(["c"]) == moves_of(read="c")
    assert table.evict("a") == moves_of("a")
    table.remove("a")
    assert table.add("b", 6)


def test_what_was_never_told_of_is_ready():
    table = HostTable(0)
    assert table.pin(["x"]) == ()
    assert table.is_ready(["x"])
    table.unpin(["x"])
    assert table.num_bytes == 0


def test_an_unpin_too_many_is_our_own_bug():
    table = table_of(10, a=10)
    bring(table, "a")
    with pytest.raises(AssertionError, match="not pinned"):
        table.unpin(["a"])
