"""The scheduler's rules, one by one: who gets how much of a step, who waits, who is put out, and how it ends."""

from dataclasses import replace

import pytest

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.moves import Copy
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.request import (
    FinishReason,
    LoraRef,
    Request,
    SampledToken,
    SamplingParams,
    ScheduledBatch,
    Status,
    TokenOutput,
)
from guanaco.server.engine.scheduler import MAX_PASSED_OVER_STEPS, Limits, Scheduler

EOS = 7
LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, queue_timeout_seconds=10.0)
PARAMS = SamplingParams(max_tokens=50, seed=0)


class Bench:
    """A scheduler, and a model that always says token 1."""

    def __init__(
        self, *, num_blocks: int = 64, block_size: int = 4, num_slots: int = 2, limits: Limits = LIMITS
    ) -> None:
        self.scheduler = Scheduler(
            limits, BlockManager(num_blocks, block_size), ResidencyLedger(SlotTable(num_slots)), frozenset({EOS})
        )
        self.now = 0.0
        self.batch = ScheduledBatch((), {}, ())

    def add(
        self, name: str, length: int, *, first: int = 0, adapters: str = "", background: bool = False, **params: object
    ) -> None:
        prompt = tuple(range(100 * first + 10, 100 * first + 10 + length))
        loras = tuple(LoraRef(version) for version in adapters)
        self.scheduler.add(
            Request(name, prompt, replace(PARAMS, **params), loras, arrival_seconds=self.now, background=background)
        )

    def step(self, token: int = 1) -> list[TokenOutput]:
        self.batch = self.scheduler.schedule(self.now)
        sampled = tuple(SampledToken(token if item.needs_sample else None) for item in self.batch.sequences)
        return self.scheduler.update(self.batch, sampled)[0]

    @property
    def shares(self) -> dict[str, int]:
        """Request id → tokens, of the last step."""
        return {item.sequence.request.request_id: item.num_new_tokens for item in self.batch.sequences}

    @property
    def waiting(self) -> list[str]:
        return [s.request.request_id for s in self.scheduler.waiting]

    @property
    def running(self) -> list[str]:
        return [s.request.request_id for s in self.scheduler.running]


def test_a_long_prompt_is_computed_in_pieces_and_then_decodes() -> None:
    bench = Bench()
    bench.add("a", 40)
    seen = []
    for _ in range(5):
        outputs = bench.step()
        seen.append((bench.shares["a"], len(outputs)))
    assert seen == [(16, 0), (16, 0), (8, 1), (1, 1), (1, 1)]


def test_the_budget_is_shared_in_order_of_arrival() -> None:
    bench = Bench()
    for number, name in enumerate("abc"):
        bench.add(name, 10, first=number)
    bench.step()
    assert bench.shares == {"a": 10, "b": 6}
    bench.step()
    # a decodes now: prompts get a quarter of the 16
    assert bench.shares == {"a": 1, "b": 4}


def test_who_decodes_gets_a_token_in_every_step() -> None:
    bench = Bench()
    bench.add("a", 4)
    bench.step()
    bench.add("long", 60, first=1)
    for _ in range(15):
        bench.step()
        assert bench.shares == {"a": 1, "long": 4}


def test_no_more_run_than_may() -> None:
    bench = Bench()
    for number in range(6):
        bench.add(f"r{number}", 2, first=number)
    bench.step()
    assert bench.running == ["r0", "r1", "r2", "r3"]
    bench.scheduler.abort("r1")
    bench.step()
    assert bench.running == ["r0", "r2", "r3", "r4"]


def test_the_youngest_is_put_out_and_comes_back_in_its_turn() -> None:
    bench = Bench(num_blocks=17, limits=replace(LIMITS, max_num_batched_tokens=64))
    bench.add("old", 24)
    bench.add("young", 24, first=1)
    bench.step()
    assert bench.running == ["old", "young"]
    bench.add("later", 4, first=2)
    while "young" in bench.running:
        assert bench.shares.get("old") is not None
        bench.step()
    young = bench.scheduler.waiting[0]
    assert (young.request.request_id, young.status, young.num_preemptions) == ("young", Status.WAITING, 1)
    assert (young.block_table, young.num_computed_tokens) == ([], 0)
    tokens = list(young.token_ids)
    assert tokens[24:], "what it had written stays"
    bench.scheduler.abort("old")
    bench.step()
    assert bench.running[0] == "young"
    assert young.token_ids[: len(tokens)] == tokens


def test_a_request_that_can_never_run_is_refused_with_the_numbers() -> None:
    bench = Bench()
    bench.add("fits", 63)
    for length, adapters, text in (
        (64, "", "64 tokens.* context of 64"),
        (0, "", "no tokens"),
        (3, "xyz", "3 adapters.* 2 slots"),
    ):
        with pytest.raises(ValueError, match=text):
            bench.add("never", length, adapters=adapters)
    assert bench.waiting == ["fits"]


def test_a_prompt_without_tokens_to_generate_is_computed_and_ends() -> None:
    bench = Bench()
    bench.add("scored", 64, max_tokens=0)  # as long as the context: there is nothing to come after it
    bench.add("one", 1, max_tokens=0, first=1)
    bench.add("other", 3, max_tokens=2, first=2)
    ends: dict[str, TokenOutput] = {}
    for _ in range(20):
        for output in bench.step():
            if output.finish_reason is not None:
                ends[output.request_id] = output
    assert {name: (o.finish_reason, o.token_ids) for name, o in ends.items()} == {
        "scored": (FinishReason.LENGTH, ()),
        "one": (FinishReason.LENGTH, ()),
        "other": (FinishReason.LENGTH, (1,)),
    }
    assert not bench.scheduler.has_work
    with pytest.raises(ValueError, match="65 tokens"):
        bench.add("too long", 65, max_tokens=0)


def test_the_end_of_the_context_is_a_length() -> None:
    bench = Bench(num_blocks=16)
    bench.add("a", 60, max_tokens=100)
    outputs: list[TokenOutput] = []
    while bench.scheduler.has_work:
        outputs += bench.step()
    assert [o.finish_reason for o in outputs] == [None, None, None, FinishReason.LENGTH]
    assert bench.scheduler.blocks.num_free_blocks == 16


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason", "count"),
    [
        ({"max_tokens": 3}, [1, 1, 1], FinishReason.LENGTH, None, 3),
        ({}, [1, EOS], FinishReason.STOP, None, 2),
        ({"ignore_eos": True, "max_tokens": 3}, [1, EOS, 1], FinishReason.LENGTH, None, 3),
        ({"stop_token_ids": frozenset({5})}, [1, 5], FinishReason.STOP, 5, 2),
        ({"stop_token_ids": frozenset({5}), "ignore_eos": True}, [EOS, 5], FinishReason.STOP, 5, 2),
        ({"max_tokens": 2}, [1, EOS], FinishReason.STOP, None, 2),
    ],
)
def test_how_a_request_ends(
    params, tokens: list[int], reason: FinishReason, stop_reason: int | None, count: int
) -> None:
    bench = Bench()
    bench.add("a", 3, **params)
    outputs = [output for token in tokens for output in bench.step(token)]
    assert len(outputs) == count
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (count - 1)
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (reason, stop_reason)
    assert not bench.scheduler.has_work


def test_who_waits_too_long_is_told_so_and_who_was_let_in_once_is_not() -> None:
    bench = Bench(num_blocks=16)
    bench.add("runs", 30)
    bench.step()
    bench.add("waits", 40, first=1)
    bench.now = 10.1
    (timeout,) = [o for o in bench.step() if o.request_id == "waits"]
    assert (timeout.finish_reason, timeout.error) == (FinishReason.ERROR, ErrorCode.QUEUE_TIMEOUT)
    assert bench.running == ["runs"]
    bench.scheduler._preempt(bench.scheduler.running[0])
    bench.now = 1000.0
    bench.step()
    bench.step()
    assert bench.running == ["runs"]


def test_a_request_whose_adapter_finds_no_slot_lets_others_pass_for_a_while() -> None:
    bench = Bench(num_slots=1, limits=replace(LIMITS, queue_timeout_seconds=0.0))
    bench.add("x1", 3, adapters="x", max_tokens=60)
    bench.step()
    bench.add("y", 3, first=1, adapters="y")
    bench.add("base", 3, first=2)
    bench.add("x2", 3, first=3, adapters="x")
    bench.step()
    assert bench.running == ["x1", "base", "x2"]
    bench.scheduler.abort("x2")
    for _ in range(MAX_PASSED_OVER_STEPS):
        bench.step()
    bench.add("x3", 3, first=4, adapters="x")
    bench.add("base2", 3, first=5)
    bench.step()
    assert "x3" not in bench.running, "y has waited long enough: nobody else who needs a slot goes first"
    assert "base2" in bench.running, "a base request needs none"
    bench.scheduler.abort("x1")
    bench.step()
    assert "y" in bench.running


def test_a_step_names_the_slots_of_its_adapters_and_the_copies_to_make() -> None:
    bench = Bench()
    bench.add("a", 3, adapters="x")
    bench.add("b", 3, adapters="y", first=1)
    bench.add("base", 3, first=2)
    bench.step()
    slots = bench.batch.adapter_slots
    assert sorted(slots) == ["x", "y"]
    assert set(bench.batch.moves) == {Copy(version, slot) for version, slot in slots.items()}
    bench.step()
    assert bench.batch.moves == ()


def test_a_failed_row_ends_its_own_request_only() -> None:
    bench = Bench()
    bench.add("good", 3)
    bench.add("bad", 3, first=1)
    batch = bench.scheduler.schedule(0.0)
    sampled = (SampledToken(1), SampledToken(None, error="numerical_error"))
    (good, bad), _ = bench.scheduler.update(batch, sampled)
    assert (good.token_ids, good.finish_reason) == ((1,), None)
    assert (bad.finish_reason, bad.error) == (FinishReason.ERROR, "numerical_error")
    assert bench.running == ["good"]


def test_a_prompt_seen_before_is_found_but_for_its_last_token() -> None:
    bench = Bench()
    bench.add("first", 12)
    bench.step()
    bench.add("again", 12)
    bench.step()
    assert bench.shares["again"] == 4  # 8 of 12 tokens come from the cache: the last block's logits are needed
    assert bench.scheduler.counts.prefix_hits_tokens == 8


def test_waiting_tokens_are_counted_as_they_come_and_go() -> None:
    bench = Bench(limits=replace(LIMITS, max_num_seqs=1))
    for number, name in enumerate("abc"):
        bench.add(name, 5 + number, first=number)
    assert bench.scheduler.num_waiting_tokens == 18
    bench.step()
    assert bench.scheduler.num_waiting_tokens == 13
    bench.scheduler.abort("c")
    assert bench.scheduler.num_waiting_tokens == 6


def test_background_work_goes_last_but_not_for_ever() -> None:
    limits = replace(LIMITS, max_num_seqs=1)
    bench = Bench(limits=limits)
    bench.add("probe", 3, background=True, max_tokens=1)
    bench.add("first", 3, max_tokens=1)
    bench.step()
    assert (list(bench.shares), bench.waiting) == (["first"], ["probe"]), "who came later goes before it"
    bench.add("other", 3, max_tokens=1)
    order = []
    for number in range(MAX_PASSED_OVER_STEPS + 3):  # there is always somebody else
        bench.add(f"r{number}", 3, max_tokens=1)
        bench.step()
        order += bench.shares
    assert order.index("probe") == MAX_PASSED_OVER_STEPS, "one step less: it was passed over once before"


def test_background_work_alone_runs_at_once() -> None:
    bench = Bench()
    bench.add("probe", 3, background=True, max_tokens=1)
    bench.step()
    assert list(bench.shares) == ["probe"]
