"""One step of the engine where things fail: only those at fault get an error, a broken device is not their fault."""

import logging

import pytest

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine, EngineFailure
from guanaco.server.engine.request import FinishReason, LoraRef, Request, SamplingParams, Submit, TokenOutput
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.simulation.fake_runner import FakeRunner, expected_tokens

NUM_TOKENS = 6
LIMITS = Limits(max_num_seqs=16, max_num_batched_tokens=64, max_model_len=64, queue_timeout_seconds=0.0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("guanaco.server.engine.engine").disabled = True


class Bench:
    """An engine over the arithmetic model, and what its requests have got."""

    def __init__(self, num_slots: int = 4) -> None:
        self.runner = FakeRunner(128, 4, num_slots)
        scheduler = Scheduler(LIMITS, BlockManager(128, 4), ResidencyLedger(SlotTable(num_slots)), frozenset())
        self.engine = Engine(scheduler, self.runner, clock=lambda: 0.0)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenOutput] = {}

    def add(self, name: str, adapter: str | None = None) -> None:
        prompt = tuple(name.encode()) * 2
        loras = () if adapter is None else (LoraRef(adapter),)
        request = Request(name, prompt, SamplingParams(max_tokens=NUM_TOKENS, seed=3), loras)
        self.requests[name] = request
        self.tokens[name] = []
        self.engine.handle(Submit(request))

    def run(self, num_steps: int = 100) -> None:
        for _ in range(num_steps):
            if not self.engine.has_work:
                return
            for output in self.engine.step().outputs:
                self.tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    assert output.request_id not in self.ends, "ended twice"
                    self.ends[output.request_id] = output

    def assert_right(self, *names: str) -> None:
        for name in names:
            assert self.tokens[name] == expected_tokens(self.requests[name], NUM_TOKENS, self.runner.vocab_size)
            assert self.ends[name].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("bad", [{0}, {6}, {3}, {0, 6}, {1, 2, 5}, {0, 1, 2, 3, 4, 5}])
@pytest.mark.parametrize("when", [0, 2])
def test_a_bad_request_fails_alone(bad: set[int], when: int) -> None:
    bench = Bench()
    for number in range(7):
        bench.add(f"r{number}")
    bench.run(when)
    bench.runner.faults.raising_ids |= {f"r{number}" for number in bad}
    bench.run()
    for number in bad:
        assert (bench.ends[f"r{number}"].finish_reason, bench.ends[f"r{number}"].error) == (
            FinishReason.ERROR,
            ErrorCode.INTERNAL_ERROR,
        )
    bench.assert_right(*(f"r{number}" for number in range(7) if number not in bad))


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_pass_that_is_too_large_for_memory_is_run_in_parts(most: int) -> None:
    bench = Bench()
    names = [f"r{number}" for number in range(8)]
    for name in names:
        bench.add(name)
    bench.run(1)
    bench.runner.faults.max_tokens = most
    bench.run()
    bench.assert_right(*names)


def test_a_pass_that_fails_once_costs_nobody_anything() -> None:
    bench = Bench()
    bench.add("a")
    bench.add("b")
    for _ in range(4):
        bench.runner.faults.num_raising_runs = 1
        bench.run(1)
    bench.run()
    bench.assert_right("a", "b")


def test_an_adapter_that_cannot_be_loaded_hurts_only_its_requests() -> None:
    bench = Bench()
    bench.runner.faults.bad_versions = {"broken"}
    for name, adapter in (("base", None), ("x", "fine"), ("y", "broken"), ("z", "broken")):
        bench.add(name, adapter)
    bench.run()
    bench.assert_right("base", "x")
    assert {bench.ends[name].error for name in ("y", "z")} == {ErrorCode.ADAPTER_LOAD_FAILED}
    bench.runner.faults.bad_versions.clear()
    bench.add("later", "broken")
    bench.run()
    bench.assert_right("later")


def test_a_broken_device_is_not_the_requests_fault() -> None:
    bench = Bench()
    bench.add("a")
    bench.add("b")
    bench.run(2)
    bench.runner.faults.broken = True
    with pytest.raises(EngineFailure):
        bench.run()
    assert not bench.ends


def test_one_bad_request_at_a_quiet_time_does_not_end_the_engine() -> None:
    bench = Bench()
    for number in range(5):
        bench.add(f"bad{number}")
        bench.runner.faults.raising_ids = {f"bad{number}"}
        bench.run()
        assert bench.ends[f"bad{number}"].error == ErrorCode.INTERNAL_ERROR
    bench.add("good")
    bench.run()
    bench.assert_right("good")


def test_a_request_without_a_seed_gets_one_of_its_own_and_keeps_it() -> None:
    bench = Bench()
    prompt = (1, 2, 3)
    for number in range(8):
        bench.engine.handle(Submit(Request(f"r{number}", prompt, SamplingParams(max_tokens=2))))
    seeds = [s.request.params.seed for s in bench.engine.scheduler.waiting]
    assert len(set(seeds)) == 8
    assert None not in seeds
    bench.engine.step()
    first = bench.engine.scheduler.running[0]
    bench.engine.scheduler._preempt(bench.engine.scheduler.running[0])
    assert first.request.params.seed == seeds[0]


def test_the_statistics_of_a_step() -> None:
    bench = Bench()
    bench.add("a", "x")
    bench.add("base")
    stats = bench.engine.step().stats
    assert (stats.num_running, stats.num_waiting, stats.num_scheduled_tokens) == (2, 0, 2 + 8)
    assert (stats.running_adapters, stats.waiting_adapters) == (("x",), ())
    assert stats.sequence_versions == (("x",), ())
    assert 0 < stats.kv_usage_ratio < 0.1
