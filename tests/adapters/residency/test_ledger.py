"""The one ledger of residency: each call returns all the moves that its change takes."""

import pytest

from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.moves import Copy, Evict, Read
from guanaco.adapters.residency.slot_table import SlotTable


def ledger_of(room: int, num_slots: int = 2, arena: int = 0, **device_bytes: int) -> ResidencyLedger:
    """Versions a to d take one byte of host memory each."""
    ledger = ResidencyLedger(SlotTable(num_slots, arena), HostTable(room))
    for version in "abcd":
        assert ledger.add(version, 1, device_bytes.get(version, 0))
    return ledger


def run(ledger: ResidencyLedger, version: str) -> None:
    """A request for a version, from its arrival to its end; the version stays where it came to be."""
    ledger.enter([version])
    assert ledger.hold([version]) is not None
    if not ledger.is_ready([version]):
        ledger.read_done(version, is_here=True)
    assert ledger.place([version])
    ledger.step_moves()
    ledger.unplace([version])
    assert ledger.leave([version], holds=True) == ()
    ledger.check()


def test_the_way_of_a_version_from_disk_to_device_and_back() -> None:
    ledger = ledger_of(room=1)
    ledger.enter(["a"])
    assert ledger.hold(["a"]) == (Read("a"),)
    assert (ledger.tier("a"), ledger.hold(["b"])) == ("disk", None)
    assert ledger.read_done("a", is_here=True) == ()
    assert ledger.tier("a") == "host"
    assert ledger.place(["a"])
    assert ledger.slots_of(["a", "a"]) == {"a": 0}
    assert (ledger.step_moves(), ledger.step_moves(), ledger.tier("a")) == ((Copy("a", 0),), (), "device")
    ledger.unplace(["a"])
    assert ledger.leave(["a"], holds=True) == ()
    assert ledger.hold(["b"]) == (Evict("a", slot=0, from_host=True), Read("b")), "it leaves the device first"
    assert ledger.tier("a") == "disk"
    ledger.check()


def test_what_is_kept_makes_room_like_a_request() -> None:
    ledger = ledger_of(room=1)
    run(ledger, "a")
    assert ledger.keep("b") == (Evict("a", slot=0, from_host=True), Read("b"))
    assert ledger.keep("c") is None
    assert ledger.read_done("b", is_here=True) == ()
    assert ledger.hold(["c"]) is None
    ledger.unkeep("b")
    assert ledger.keep("c") == (Evict("b", slot=None, from_host=True), Read("c"))


def test_a_version_is_forgotten_when_its_last_request_leaves() -> None:
    ledger = ledger_of(room=2)
    run(ledger, "a")
    ledger.enter(["a", "b"])
    ledger.enter(["a"])
    assert ledger.forget("a") == ()
    assert ledger.leave(["a", "b"], holds=False) == ()
    assert ledger.leave(["a"], holds=False) == (Evict("a", slot=0, from_host=True, is_forgotten=True),)
    assert not ledger.host.is_known("a")
    ledger.check()


def test_a_version_is_forgotten_when_its_read_ends() -> None:
    ledger = ledger_of(room=2)
    for ends_well in (True, False):
        version = "ab"[ends_well]
        ledger.enter([version])
        ledger.hold([version])
        assert ledger.leave([version], holds=True) == ()
        assert ledger.forget(version) == ()
        ledger.check()
        gone = Evict(version, from_host=ends_well, is_forgotten=True)
        assert ledger.read_done(version, is_here=ends_well) == (gone,)
    assert ledger.host.num_bytes == 0
    assert ledger.forget("c") == (Evict("c", is_forgotten=True),), "one on disk only is forgotten at once"


def test_a_version_that_is_told_of_again_is_not_forgotten() -> None:
    ledger = ledger_of(room=2)
    ledger.enter(["a"])
    assert ledger.forget("a") == ()
    assert ledger.add("a", 1, 0)
    assert ledger.leave(["a"], holds=False) == ()
    assert ledger.host.is_known("a")


def test_slots_that_lose_their_bytes_are_emptied_before_copies_are_made() -> None:
    ledger = ledger_of(room=4, num_slots=3, arena=2, a=1, b=1, c=2)
    run(ledger, "a")
    run(ledger, "b")
    ledger.enter(["c"])
    ledger.hold(["c"])
    ledger.read_done("c", is_here=True)
    assert ledger.can_place(["c"])
    assert ledger.place(["c"])
    assert ledger.step_moves() == (Evict("a", slot=0), Evict("b", slot=1), Copy("c", 2))
    ledger.copy_failed(2)
    assert ledger.step_moves() == (Copy("c", 2),)


def test_versions_that_never_fit_together_are_refused_with_the_numbers() -> None:
    ledger = ledger_of(room=2, num_slots=2)
    ledger.check_fits("ab")
    with pytest.raises(ValueError, match="3 adapters in one request: 2 slots"):
        ledger.check_fits("abc")
    with pytest.raises(ValueError, match="2 adapters in one request: 1 bytes"):
        ledger_of(room=1).check_fits("ab")
    assert not ledger.add("large", 1, device_bytes=1)
    assert not ledger.host.is_known("large")
