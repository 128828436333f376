"""The simulator's world under hypothesis: any order of events, and the shortest one that breaks something."""

import logging

import pytest
from hypothesis import HealthCheck, Phase, settings
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
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Sequence
from support.simulation.simulator import Simulation, World

PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=14)
ADAPTERS = st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), st.sampled_from([1.0, 0.5])), max_size=2)


class Engine(RuleBasedStateMachine):
    """Two slots, few blocks, three adapters: everything has to share."""

    @initialize(block_size=st.sampled_from([1, 2, 4]), spare=st.integers(0, 6), budget=st.integers(3, 9))
    def start(self, block_size: int, spare: int, budget: int) -> None:
        logging.getLogger("guanaco.server.engine.engine").disabled = True
        world = World(
            block_size=block_size,
            num_blocks=-(-16 // block_size) + spare,
            max_model_len=16,
            max_num_seqs=3,
            max_num_batched_tokens=budget,
            num_slots=2,
            queue_timeout_seconds=30.0,
            vocab_size=4,
            fault_chance=0.0,
        )
        self.simulation = Simulation(0, world)
        self.number = 0

    @rule(prompt=PROMPTS, adapters=ADAPTERS, salt=st.sampled_from(["", "t"]), max_tokens=st.integers(1, 6))
    def submit(self, prompt: list[int], adapters: list[tuple[str, float]], salt: str, max_tokens: int) -> None:
        self.number += 1
        loras = tuple(LoraRef(version, scale) for version, scale in dict(adapters).items())
        params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
        name, now = f"r{self.number}", self.simulation.now
        self.simulation.submit(Request(name, tuple(prompt), params, loras, cache_salt=salt, arrival_seconds=now))

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.simulation.clients)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.abort(data.draw(st.sampled_from(sorted(self.simulation.clients))))
        self.simulation.step()

    @precondition(lambda self: self.simulation.clients)
    @rule(data=st.data(), kind=st.sampled_from(["nan_ids", "raising_ids"]))
    def fail_one(self, data: st.DataObject, kind: str) -> None:
        getattr(self.simulation.runner.faults, kind).add(data.draw(st.sampled_from(sorted(self.simulation.clients))))

    @rule(kind=st.sampled_from(["num_raising_runs", "num_failing_loads"]))
    def fail_once(self, kind: str) -> None:
        setattr(self.simulation.runner.faults, kind, 1)

    @rule(most=st.none() | st.integers(1, 6))
    def memory_gets_tight(self, most: int | None) -> None:
        self.simulation.runner.faults.max_tokens = most

    @rule()
    def evict(self) -> None:
        self.simulation.blocks.evict_cached()

    @rule(seconds=st.sampled_from([1.0, 29.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.simulation.now += seconds

    @rule(chance=st.sampled_from([0.0, 0.3]))
    def ledger_faults(self, chance: float) -> None:
        self.simulation.faults.chance = chance

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.finish()


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_any_order_of_events(proof_count) -> None:
    run_state_machine_as_test(Engine, settings=settings(SETTINGS, max_examples=proof_count(500, 5000)))


def _one_block_too_few(
    self: BlockManager, sequence: Sequence, num_tokens: int, _original=BlockManager.allocate
) -> bool:
    return _original(self, sequence, num_tokens - 1)


@pytest.mark.parametrize(
    ("where", "attribute", "bug"),
    [(BlockManager, "allocate", _one_block_too_few), (SlotTable, "take_loads", lambda self: ())],
)
def test_a_planted_bug_is_found(where, attribute, bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, attribute, bug)
    found_is_enough = settings(SETTINGS, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, IndexError)):
        run_state_machine_as_test(Engine, settings=found_is_enough)
