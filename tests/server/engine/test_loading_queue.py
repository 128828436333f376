"""Requests whose adapters are away: they wait by themselves, in order, within a deadline and a bound of steps."""

from dataclasses import dataclass, field

import pytest

from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.messages import AddVersion, ForgetVersion, ReadDone
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.loading_queue import MAX_STEPS_WITHOUT_ROOM
from guanaco.server.engine.request import Abort, FinishReason, LoraRef, Request, SamplingParams, Submit, TokenOutput
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.simulation.fake_runner import FakeRunner, expected_tokens

LIMITS = Limits(8, 64, 64, queue_timeout_seconds=0.0, adapter_timeout_seconds=5.0)


@dataclass
class HandSource:
    """Reads begin, and end when a test says so."""

    started: list[str] = field(default_factory=list)
    here: set[str] = field(default_factory=set)
    forgotten: list[str] = field(default_factory=list)

    def start(self, version: str) -> None:
        assert version not in self.started
        self.started.append(version)

    def drop(self, version: str) -> None:
        self.here.remove(version)

    def gone(self, version: str) -> None:
        self.forgotten.append(version)


class Bench:
    """An engine with room for `room` adapters of one byte, one letter each, on a clock that a test moves."""

    def __init__(self, room: int, adapters: str = "abcdef") -> None:
        self.now = 0.0
        self.source = HandSource()
        self.runner = FakeRunner(128, 4, 4)
        self.host = HostTable(room)
        scheduler = Scheduler(LIMITS, BlockManager(128, 4), ResidencyLedger(SlotTable(4), self.host), frozenset())
        self.scheduler = scheduler
        self.engine = Engine(scheduler, self.runner, clock=lambda: self.now)
        self.engine.source = self.source
        for version in adapters:
            assert self.engine.handle(AddVersion(version, 1)) == (True,)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenOutput] = {}

    def add(self, name: str, adapters: str, max_tokens: int = 3) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True)
        loras = tuple(LoraRef(version) for version in adapters)
        request = Request(name, tuple(name.encode()), params, loras, arrival_seconds=self.now)
        self.requests[name], self.tokens[name] = request, []
        self.engine.handle(Submit(request))

    def read(self, version: str, error: str | None = None) -> None:
        self.source.started.remove(version)
        if error is None:
            self.source.here.add(version)
        self.engine.handle(ReadDone(version, error))

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for output in self.engine.step().outputs:
                self.tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    self.ends[output.request_id] = output
        assert self.runner.violation is None
        self.scheduler.residency.check()

    def finish(self) -> None:
        for _ in range(200):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it does not end")

    def assert_right(self, *names: str) -> None:
        for name in names:
            count = self.requests[name].params.max_tokens
            assert self.tokens[name] == expected_tokens(self.requests[name], count, self.runner.vocab_size)

    @property
    def loading(self) -> list[str]:
        return [sequence.request.request_id for sequence in self.scheduler.loading.sequences]

    @property
    def running(self) -> list[str]:
        return [sequence.request.request_id for sequence in self.scheduler.running]


def test_reading_begins_at_once_and_others_go_on() -> None:
    bench = Bench(room=2)
    bench.add("one", "a")
    bench.add("two", "a")
    bench.add("base", "")
    assert (bench.source.started, bench.loading) == (["a"], ["one", "two"])
    bench.step()
    assert bench.running == ["base"]
    bench.read("a")
    bench.step()
    assert bench.running == ["one", "two", "base"]
    bench.finish()
    bench.assert_right("one", "two", "base")


def test_an_engine_that_only_waits_has_no_work_until_somebody_is_late() -> None:
    bench = Bench(room=2)
    bench.add("one", "a")
    assert not bench.engine.has_work
    assert bench.engine.seconds_left == 5.0
    bench.now = 2.0
    bench.add("two", "b")
    bench.now = 5.5
    assert bench.engine.has_work
    bench.step()
    assert (bench.ends["one"].finish_reason, bench.ends["one"].error) == (FinishReason.ERROR, ErrorCode.ADAPTER_TIMEOUT)
    assert (bench.loading, bench.host.num_pins("a")) == (["two"], 0)
    assert not bench.engine.has_work
    assert bench.engine.seconds_left == pytest.approx(1.5)
    bench.read("b")
    assert bench.engine.has_work
    assert bench.engine.seconds_left is None
    bench.now = 100.0
    bench.finish()
    bench.assert_right("two")


def test_a_failed_read_ends_who_waited_for_it_and_nobody_else() -> None:
    bench = Bench(room=3)
    bench.add("one", "a")
    bench.add("both", "ab")
    bench.add("other", "b")
    bench.read("a", error="adapter_broken")
    bench.step()
    assert {name: end.error for name, end in bench.ends.items()} == dict.fromkeys(("one", "both"), "adapter_broken")
    bench.read("b")
    bench.finish()
    bench.assert_right("other")
    bench.add("again", "a")
    assert bench.source.started == ["a"]


def test_who_finds_no_room_gets_it_when_others_let_go() -> None:
    bench = Bench(room=1)
    bench.add("one", "a")
    bench.read("a")
    bench.add("two", "b")
    assert bench.source.started == []
    bench.step(3)
    assert bench.ends.keys() == {"one"}
    assert (bench.source.started, bench.source.here) == (["b"], set())
    assert bench.runner.slots[0] is None, "what leaves memory leaves the device"
    bench.read("b")
    bench.finish()
    bench.assert_right("one", "two")


def test_an_abort_hands_the_room_on() -> None:
    bench = Bench(room=1)
    bench.add("one", "a")
    bench.read("a")
    bench.add("two", "b")
    bench.engine.handle(Abort("one"))
    bench.step()
    assert bench.source.started == ["b"]


def test_a_removed_adapter_hands_its_room_on() -> None:
    bench = Bench(room=2)
    bench.source.here.add("fixed")
    assert bench.scheduler.residency.add("fixed", 1, 0, is_permanent=True)
    bench.add("one", "a")
    bench.read("a")
    bench.add("two", "b")
    bench.engine.handle(ForgetVersion("a"))
    assert (bench.source.forgotten, bench.source.started) == ([], []), "somebody holds it"
    bench.engine.handle(ForgetVersion("fixed"))
    assert (bench.source.forgotten, bench.source.here, bench.source.started) == (["fixed"], {"a"}, ["b"])


def test_what_is_to_be_forgotten_goes_with_the_last_request_that_names_it() -> None:
    bench = Bench(room=1)
    bench.add("one", "a")
    bench.add("waits", "b")
    bench.add("late", "a")
    bench.engine.handle(ForgetVersion("a"), ForgetVersion("c"))
    assert bench.source.forgotten == ["c"]
    bench.engine.handle(Abort("one"), Abort("late"))
    assert bench.source.forgotten == ["c"], "it is being read"
    bench.read("a")
    assert (bench.source.forgotten, bench.source.here, bench.source.started) == (["c", "a"], set(), ["b"])
    assert not bench.host.is_known("a")
    assert bench.runner.slots == [None] * 4


def test_what_comes_back_before_it_is_gone_stays() -> None:
    bench = Bench(room=2)
    bench.add("one", "a")
    bench.read("a")
    bench.engine.handle(ForgetVersion("a"), AddVersion("a", 1))
    bench.finish()
    bench.assert_right("one")
    assert (bench.source.forgotten, bench.source.here) == ([], {"a"})


def test_kept_ones_are_exchanged_before_anybody_else_gets_the_room() -> None:
    bench = Bench(room=1)
    assert bench.engine.handle(AddVersion("a", 1, is_kept=True)) == (True,)
    bench.read("a")
    bench.add("waits", "b")
    assert bench.engine.handle(AddVersion("c", 1, is_kept=True)) == (False,)
    exchange = (AddVersion("a", 0, is_kept=False), AddVersion("c", 1, is_kept=True))
    assert bench.engine.handle(*exchange) == (True, True)
    assert (bench.source.started, bench.host.kept) == (["c"], {"c"})
    bench.engine.handle(AddVersion("never", 0, is_kept=False))
    assert not bench.host.is_known("never")


def test_what_is_kept_from_the_start_is_read_when_the_engine_runs() -> None:
    bench = Bench(room=1)
    kept = (AddVersion("a", 1, is_kept=True), AddVersion("b", 1, is_kept=True))
    assert bench.engine.keep_from_start(*kept) == (True, False)
    assert bench.source.started == []
    bench.engine.handle()
    bench.engine.handle()
    assert (bench.source.started, bench.host.kept) == (["a"], {"a"})


def test_nobody_waits_for_room_for_ever() -> None:
    """Two adapters in constant use, room for two, and one request for a third."""
    bench = Bench(room=2)
    for version in "ab":
        bench.add(version, version)
        bench.read(version)
    bench.add("rare", "c", max_tokens=1)
    steps = 0
    while "c" not in bench.source.started:
        for version in "ab":
            bench.add(f"{version}{steps}", version)
        bench.step()
        steps += 1
        assert steps <= MAX_STEPS_WITHOUT_ROOM + 10
    assert steps > MAX_STEPS_WITHOUT_ROOM
    bench.read("c")
    assert "rare" not in bench.loading
    for _ in range(100):
        bench.step()
        for version in [*bench.source.started]:
            bench.read(version)
    assert len(bench.ends) == len(bench.requests)
    bench.assert_right(*bench.requests)


def test_a_read_that_hangs_does_not_block_others_for_want_of_room() -> None:
    """What waits for room that only a hanging read could give back waits alone."""
    bench = Bench(room=2)
    bench.add("hangs", "a")
    bench.add("both", "bc")
    bench.add("base", "", max_tokens=60)
    bench.step(MAX_STEPS_WITHOUT_ROOM + 5)
    bench.add("other", "d")
    assert bench.source.started == ["a", "d"]
    bench.read("d")
    bench.step(3)
    bench.assert_right("other")
