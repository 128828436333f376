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

from guanaco.adapters.slot_table import SlotTable

VERSIONS = [f"v{i}" for i in range(7)]


class SlotTableMachine(RuleBasedStateMachine):
    """Any order of pins, unpins, loads and removals; a list in order of use is the model of what goes first."""

    @initialize(num_slots=st.integers(0, 4))
    def start(self, num_slots):
        self.table = SlotTable(num_slots)
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
        if num_victims > len(evictable):
            assert plan is None
            assert self.table.resident == before
            return
        assert plan is not None
        assert plan.evicted == tuple(evictable[:num_victims])
        assert {version for _, version in plan.loads} == missing
        assert set(plan.slots) == set(versions)
        self.used = [v for v in self.used if v not in plan.evicted] + sorted(missing)
        self.held.append(tuple(versions))
        for version in versions:
            assert self.places.setdefault(version, plan.slots[version]) == plan.slots[version], "moved while pinned"

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
        for slot, version in self.table.take_loads():
            self.storage[slot] = version
        for version, slot in self.table.resident.items():
            if self.table.num_pins(version):
                assert self.storage[slot] == version, "a forward pass would read another adapter's matrices"
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
            everything = VERSIONS[: self.table.num_slots]
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
