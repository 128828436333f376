"""The ledger of adapter slots against a slow model of it, and the traces that a scheduler produces."""

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

from guanaco.adapters.residency.slot_table import SlotTable

VERSIONS = [f"v{i}" for i in range(7)]
SIZES = dict(zip(VERSIONS, (1, 1, 2, 3, 5, 8, 4), strict=True))


class SlotTableMachine(RuleBasedStateMachine):
    """Any order of pins, unpins, loads and removals; a list in order of use is the model of what goes first."""

    @initialize(num_slots=st.integers(0, 4), num_bytes=st.sampled_from((0, 0, 8, 12)))
    def start(self, num_slots, num_bytes):
        self.table = SlotTable(num_slots, num_bytes)
        self.arena = [None] * num_bytes  # whose bytes they are; with 0 there is none, and all is as without sizes
        for version, size in SIZES.items():
            if num_bytes:
                self.table.set_size(version, size)
        self.held = []  # one tuple of versions per running sequence
        self.used = []  # resident versions, least recently unpinned first; pinned ones are skipped when evicting
        self.storage = {}
        self.places = {}  # version → slot, since the first of its pins

    def pins(self):
        return Counter(version for versions in self.held for version in set(versions))

    @rule(versions=st.lists(st.sampled_from(VERSIONS), max_size=4))
    def pin(self, versions):
        before = self.table.resident
        expected = self.table.plan(versions)
        assert self.table.resident == before, "plan() changed something"
        missing = set(versions) - set(self.used)
        evictable = [v for v in self.used if v not in self.pins() and v not in versions]
        num_victims = max(0, len(missing) - (self.table.num_slots - len(self.used)))
        plan = self.table.pin(versions)
        assert plan == expected
        if num_victims > len(evictable) or (self.arena and not self.can_lie(versions)):
            assert plan is None
            assert self.table.resident == before
            return
        assert plan is not None
        if not self.arena:
            assert plan.evicted == tuple(evictable[:num_victims])
        assert not set(plan.evicted) & set(self.pins()), "evicted while it is held"
        assert {version for _, version in plan.loads} == missing | (set(plan.evicted) & set(versions))
        assert set(plan.slots) == set(versions)
        loaded = {version for _, version in plan.loads}
        self.used = [v for v in self.used if v not in plan.evicted] + sorted(loaded)
        self.held.append(tuple(versions))
        for version in versions:
            assert self.places.setdefault(version, plan.slots[version]) == plan.slots[version], "moved while pinned"

    def can_lie(self, versions):
        """Whether first fit finds gaps for them, once everything is gone that nobody holds: tried byte by byte."""
        arena = [None] * len(self.arena)
        for version in self.pins():
            self.fill(arena, version, self.table.offset_of(version))
        held = [version for version in dict.fromkeys(versions) if version not in self.pins()]
        before = [v for v in held if v not in self.used] + [v for v in self.used if v in held]
        for version in before:
            starts = range(len(arena) - SIZES[version] + 1)
            start = next((i for i in starts if not any(arena[i : i + SIZES[version]])), None)
            if start is None:
                return False
            self.fill(arena, version, start)
        return True

    @staticmethod
    def fill(arena, version, offset):
        arena[offset : offset + SIZES[version]] = [version] * SIZES[version]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data):
        versions = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.table.unpin(versions)
        for version in dict.fromkeys(versions):
            if version not in self.pins():
                del self.places[version]
                self.used.remove(version)
                self.used.append(version)

    @rule()
    def step(self):
        for slot, _ in self.table.take_clears():
            assert slot not in self.table.resident.values()
            self.storage.pop(slot, None)
        for slot, version in self.table.take_loads():
            self.storage[slot] = version
            if self.arena:
                self.fill(self.arena, version, self.table.offset_of(version))
        for version, slot in self.table.resident.items():
            if self.table.num_pins(version):
                assert self.storage[slot] == version, "a forward pass would read another adapter's matrices"
                if self.arena:
                    start = self.table.offset_of(version)
                    assert set(self.arena[start : start + SIZES[version]]) == {version}, "others' bytes"
        assert self.table.take_loads() == ()

    @rule(slot=st.integers(0, 3))
    def fail(self, slot):
        if slot < self.table.num_slots:
            self.storage.pop(slot, None)
            self.table.load_failed(slot)

    @rule(version=st.sampled_from(VERSIONS))
    def forget(self, version):
        if version in self.pins():
            with pytest.raises(AssertionError):
                self.table.forget(version)
            return
        slot = self.table.forget(version)
        assert (slot is None) == (version not in self.used)
        if slot is not None:
            self.used.remove(version)
            self.storage.pop(slot, None)

    @invariant()
    def holds(self):
        if not hasattr(self, "table"):
            return
        self.table.check()
        pins = self.pins()
        assert sorted(self.table.resident) == sorted(self.used)
        assert all(self.table.num_pins(version) == pins[version] for version in VERSIONS)
        assert all(self.table.slot_of(version) == slot for version, slot in self.places.items())

    def teardown(self):
        for versions in getattr(self, "held", []):
            self.table.unpin(versions)
        if hasattr(self, "table"):
            assert all(self.table.num_pins(version) == 0 for version in VERSIONS)
            everything = VERSIONS[: self.table.num_slots]  # the smallest
            assert self.table.pin(everything) is not None, "an idle device has room for as many as it has slots"


def test_slot_table_follows_its_model(proof_count):
    count = proof_count(60, 500)
    machine = settings(max_examples=count, stateful_step_count=60, deadline=None, derandomize=True)
    run_state_machine_as_test(SlotTableMachine, settings=machine)


def test_least_recently_used_goes_first():
    table = SlotTable(2)
    for version in ("a", "b"):
        table.pin([version])
    table.unpin(["b"])
    table.unpin(["a"])
    assert table.pin(["c"]).evicted == ("b",)
    table.unpin(["c"])
    assert table.pin(["c"]).loads == ()  # it was still there
    assert table.pin(["b"]).evicted == ("a",)
    assert (table.num_evictions, table.num_loads) == (2, 0)
    assert table.take_loads() == ((0, "b"), (1, "c"))
    assert table.num_loads == 2


def test_a_request_with_two_adapters_gets_both_or_none():
    table = SlotTable(2)
    table.pin(["a"])
    assert table.pin(["b", "c"]) is None
    assert table.slot_of("b") is None
    assert table.can_ever_fit(["b", "c"])
    assert not table.can_ever_fit(["a", "b", "c"])
    assert table.can_ever_fit(["a", "a", "a"])
    assert table.pin(["a", "b"]).loads == ((1, "b"),)
    assert table.num_pins("a") == 2


def table_of_bytes(num_slots, num_bytes, **sizes):
    table = SlotTable(num_slots, num_bytes)
    for version, size in sizes.items():
        table.set_size(version, size)
    return table


def test_bytes_run_short_before_places_do():
    table = table_of_bytes(8, 100, a=40, b=40, c=60, d=101)
    assert not table.can_ever_fit(["d"])
    assert not table.can_ever_fit(["b", "c", "a"])
    for version in "ab":
        table.pin([version])
    assert table.pin(["c"]) is None
    table.unpin(["a"])
    assert table.pin(["c"]) is None, "its gap is too small, and b is held"
    table.unpin(["b"])
    table.take_loads()
    assert table.pin(["c"]).evicted == ("a", "b")
    assert table.take_clears() == ((0, "a"), (1, "b"))
    assert (table.take_loads(), table.offset_of("c"), table.used_bytes) == (((2, "c"),), 0, 60)


def test_a_gap_between_two_that_are_held_is_used_as_far_as_it_goes():
    table = table_of_bytes(8, 100, a=30, b=40, c=30, d=40, e=20, f=25)
    for version in "abc":
        table.pin([version])
    table.unpin(["b"])
    table.take_loads()
    assert table.pin(["e"]).evicted == ("b",)
    assert table.pin(["f"]) is None
    assert (table.offset_of("a"), table.offset_of("e"), table.offset_of("c")) == (0, 30, 70)
    table.unpin(["e"])
    assert table.pin(["d"]).evicted == ("e",)
    assert table.take_loads() == ((1, "d"),)


def test_one_of_a_mixture_that_lies_in_the_others_way_is_copied_again():
    """With nothing held it would otherwise wait for ever."""
    table = table_of_bytes(2, 12, a=3, b=9, x=3)
    for version in "xa":
        table.pin([version])
    table.unpin("xa")
    table.take_loads()
    plan = table.pin(["a", "b"])
    assert plan is not None
    assert set(plan.evicted) == {"x", "a"}
    assert {version for _, version in table.take_loads()} == {"a", "b"}
    table.check()


def test_a_version_whose_bytes_another_one_had_is_copied_again():
    table = table_of_bytes(3, 10, a=4, b=4, c=8)
    table.pin("ab")
    table.take_loads()
    table.unpin("ab")
    table.pin(["c"])
    assert (table.take_clears(), table.take_loads()) == (((0, "a"), (1, "b")), ((2, "c"),))
    table.unpin(["c"])
    table.pin(["a"])
    assert table.take_loads() == ((0, "a"),), "its place is the same, its bytes were c's"


def test_place_that_changes_hands_twice_in_one_step_is_copied_once():
    table = SlotTable(1)
    table.pin(["a"])
    table.unpin(["a"])  # preempted before the step ran
    table.pin(["b"])
    assert table.take_loads() == ((0, "b"),)
    table.unpin(["b"])
    table.pin(["a"])
    table.unpin(["a"])
    table.pin(["b"])
    assert table.take_loads() == (), "the storage holds b already"


def test_failed_copy_is_asked_for_again():
    table = SlotTable(1)
    table.pin(["a"])
    assert table.take_loads() == ((0, "a"),)
    table.load_failed(0)
    assert table.take_loads() == ((0, "a"),)
    table.load_failed(0)
    table.unpin(["a"])
    assert table.take_loads() == (), "nobody needs it"
    assert table.pin(["a"]).loads == ()
    assert table.take_loads() == ((0, "a"),)


def test_unpin_and_forget_guard_against_our_own_bugs():
    table = SlotTable(1)
    table.pin(["a"])
    with pytest.raises(AssertionError, match="forget of a pinned"):
        table.forget("a")
    table.unpin(["a"])
    with pytest.raises(AssertionError, match="not pinned"):
        table.unpin(["a"])
    assert table.forget("a") == 0
    assert table.forget("a") is None
