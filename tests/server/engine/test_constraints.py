"""Constraints in the engine: masks over a real small model, in any company, through preemption, and what ends how."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.error_codes import ErrorCode
from guanaco.models.loading.loader import load_model
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.constraints import MaskFiller, Words
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.engine.request import Abort, FinishReason, LoraRef, Request, SamplingParams, Submit, TokenOutput
from guanaco.server.engine.request_stream import RequestStream
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.adapters.tiny_adapters import make_adapter
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama
from support.server.fake_engine import FakeTokenizer

CPU = torch.device("cpu")
EOS, OTHER_END = 2, 1


class Digits:
    """A constraint that can be worked out by hand: the text is `length` tokens, each one of five by its place; an end
    may come after `least` of them."""

    def __init__(self, length: int, *, least: int | None = None, ends: frozenset[int] = frozenset({EOS})) -> None:
        self.error: ErrorCode | None = None
        self.is_complete = False
        self.length, self.ends = length, ends
        self.least = length if least is None else least
        self.taken: list[int] = []
        self.threads: set[str] = set()
        self.fail_at: int | None = None

    def at(self, place: int) -> list[int]:
        return [20 + 5 * place + i for i in range(5)]

    def is_end(self, token_id: int) -> bool:
        return token_id in self.ends

    def fill(self, row: Words) -> None:
        self.threads.add(threading.current_thread().name)
        if self.fail_at == len(self.taken):
            self.error = ErrorCode.GRAMMAR_STUCK
            row[:] = 0
            return
        flags = np.zeros(len(row) * 32, dtype=np.bool_)
        flags[self.at(len(self.taken))] = True
        if len(self.taken) >= self.least:
            flags[list(self.ends)] = True
        row[:] = np.packbits(flags, bitorder="little").view(np.int32)

    def accept(self, token_id: int) -> None:
        assert token_id in self.at(len(self.taken)), "each drawn token comes once, in order"
        self.taken.append(token_id)
        self.is_complete = len(self.taken) == self.length


class Setting:
    def __init__(self, root: Path) -> None:
        self.model: DecoderModel = load_model(make_tiny_llama(root / "base", kind="gqa"), reference_ops()).model
        self.registry = AdapterRegistry(
            self.model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=64)
        )
        self.registry.load("x", make_adapter(root / "x", self.model.lora_targets, rank=3, seed=1))

    def request(
        self, name: str, length: int, *, adapter: bool = False, constraint: Any = None, **fields: Any
    ) -> Request:
        entry = self.registry.resolve("x")
        assert entry is not None
        params = SamplingParams(**{"max_tokens": 20, "temperature": 1.0, "seed": length, **fields})
        prompt = tuple((7 * i + length) % 300 + 3 for i in range(length))
        return Request(name, prompt, params, (LoraRef(entry.version),) if adapter else (), constraint=constraint)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("constraints"))


class Run:
    def __init__(self, setting: Setting, *, num_blocks: int = 200, budget: int = 64) -> None:
        kv = PagedKVCache(setting.model.config, num_blocks, 4, torch.float32, CPU)
        store = SlotStore(setting.model.lora_targets, 2, CPU)
        self.runner = ModelRunner(setting.model, kv, setting.registry, store, frozenset({EOS}))
        limits = Limits(8, budget, max_model_len=128, queue_timeout_seconds=0.0)
        self.scheduler = Scheduler(limits, BlockManager(num_blocks, 4), ResidencyLedger(SlotTable(2)), frozenset({EOS}))
        self.engine = Engine(self.scheduler, self.runner, clock=lambda: 0.0)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.num_preempted = 0

    def __call__(self, *requests: Request) -> None:
        for one in requests:
            self.outputs[one.request_id] = []
            self.engine.handle(Submit(one))
        while self.engine.has_work:
            self.step()

    def step(self) -> None:
        step = self.engine.step()
        self.num_preempted += step.stats.num_preempted
        for output in step.outputs:
            self.outputs[output.request_id].append(output)

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]

    def last(self, name: str) -> TokenOutput:
        return self.outputs[name][-1]


def test_a_constraint_is_kept_and_ends_its_request(setting: Setting) -> None:
    run, constraint = Run(setting), Digits(7)
    run(setting.request("a", 9, constraint=constraint))
    assert run.tokens("a") == constraint.taken
    assert len(constraint.taken) == 7
    assert (run.last("a").finish_reason, run.last("a").ends_in_text) == (FinishReason.STOP, True)
    assert all(name.startswith("guanaco-masks") for name in constraint.threads), "not on the engine's own thread"


def test_masks_are_filled_while_the_forward_pass_runs(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that needs the forward pass to have begun does not wait for its end: it would never come."""
    run, constraint = Run(setting), Digits(3)
    begun, filled = threading.Event(), threading.Event()
    fill, forward = constraint.fill, setting.model.forward

    def slow_fill(row: Words) -> None:
        assert begun.wait(20)
        fill(row)
        filled.set()

    def slow_forward(*arguments: Any) -> Tensor:
        begun.set()
        assert filled.wait(20), "the mask waits for the forward pass"
        begun.clear()
        filled.clear()
        return forward(*arguments)

    constraint.fill = slow_fill  # type: ignore[method-assign]
    monkeypatch.setattr(setting.model, "forward", slow_forward)
    run(setting.request("a", 9, constraint=constraint))
    assert len(constraint.taken) == 3


def mixed(setting: Setting, constraints: dict[str, Digits]) -> list[Request]:
    return [
        setting.request("plain", 17, max_tokens=24),
        setting.request("one", 30, constraint=constraints["one"], max_tokens=30),
        setting.request("adapter", 22, adapter=True, max_tokens=24),
        setting.request("two", 11, adapter=True, constraint=constraints["two"], max_tokens=30),
        setting.request("greedy", 25, temperature=0.0, max_tokens=24, logprobs=2),
        setting.request("three", 25, temperature=0.0, constraint=constraints["three"], max_tokens=30),
    ]


def new_constraints() -> dict[str, Digits]:
    return {"one": Digits(20), "two": Digits(25), "three": Digits(18)}


@pytest.mark.parametrize("options", [{}, {"budget": 9}, {"num_blocks": 33}, {"num_blocks": 33, "budget": 9}], ids=str)
def test_each_gets_what_it_would_get_alone(setting: Setting, options: dict[str, int]) -> None:
    """Neighbours without a constraint too. Preempted sequences keep their place: no token is taken in twice."""
    alone: dict[str, list[int]] = {}
    for one in mixed(setting, new_constraints()):
        run = Run(setting)
        run(one)
        alone[one.request_id] = run.tokens(one.request_id)
    run, constraints = Run(setting, **options), new_constraints()
    run(*mixed(setting, constraints))
    assert {name: run.tokens(name) for name in alone} == alone
    assert {name: c.taken for name, c in constraints.items()} == {name: alone[name] for name in constraints}
    assert (run.num_preempted > 0) == ("num_blocks" in options)


def test_an_end_comes_only_where_it_may(setting: Setting) -> None:
    pull = {"logit_bias": ((EOS, 100.0),)}
    for least in (0, 4):
        run, constraint = Run(setting), Digits(12, least=least)
        run(setting.request("a", 9, constraint=constraint, **pull))
        assert len(constraint.taken) == least, "as soon as it may"
        assert run.tokens("a") == [*constraint.taken, EOS]
        assert (run.last("a").finish_reason, run.last("a").ends_in_text) == (FinishReason.STOP, False)


def test_min_tokens_hold_back_an_end_while_something_else_may_come(setting: Setting) -> None:
    pull = {"logit_bias": ((EOS, 100.0),), "min_tokens": 8}
    run, constraint = Run(setting), Digits(12, least=2)
    run(setting.request("a", 9, constraint=constraint, **pull))
    assert len(constraint.taken) == 8
    short = Digits(3)
    run(setting.request("b", 9, constraint=short, **pull))
    assert len(short.taken) == 3, "a text that is whole ends before min_tokens"
    assert run.last("b").finish_reason is FinishReason.STOP


def test_only_an_end_may_come_and_min_tokens_do_not_matter(setting: Setting) -> None:
    class OnlyTheEnd(Digits):
        def at(self, place: int) -> list[int]:
            return super().at(place) if place < 2 else []

    run, constraint = Run(setting), OnlyTheEnd(9, least=2)
    run(setting.request("a", 9, constraint=constraint, min_tokens=8))
    assert run.tokens("a") == [*constraint.taken, EOS]
    assert run.last("a").finish_reason is FinishReason.STOP


def test_another_end_of_the_request_ends_it(setting: Setting) -> None:
    run, constraint = Run(setting), Digits(12, least=0, ends=frozenset({OTHER_END}))
    fields = {"stop_token_ids": frozenset({OTHER_END}), "ignore_eos": True, "logit_bias": ((OTHER_END, 100.0),)}
    run(setting.request("a", 9, constraint=constraint, **fields))
    assert run.tokens("a") == [OTHER_END]
    assert (run.last("a").finish_reason, run.last("a").stop_reason) == (FinishReason.STOP, OTHER_END)


def test_length_wins_only_over_a_text_that_is_not_whole(setting: Setting) -> None:
    run = Run(setting)
    run(setting.request("cut", 9, constraint=Digits(8), max_tokens=7))
    run(setting.request("whole", 9, constraint=Digits(7), max_tokens=7))
    assert run.last("cut").finish_reason is FinishReason.LENGTH
    assert run.last("whole").finish_reason is FinishReason.STOP


def test_a_constraint_that_fails_ends_its_request_alone(setting: Setting) -> None:
    alone = Run(setting)
    alone(*mixed(setting, new_constraints()))
    run, constraints = Run(setting), new_constraints()
    constraints["two"].fail_at = 6
    run(*mixed(setting, constraints))
    failed = run.last("two")
    assert (failed.finish_reason, failed.error) == (FinishReason.ERROR, ErrorCode.GRAMMAR_STUCK)
    assert run.tokens("two") == alone.tokens("two")[:6]
    for name in ("plain", "one", "adapter", "greedy", "three"):
        assert run.tokens(name) == alone.tokens(name)
    assert run.scheduler.blocks.num_free_blocks == run.scheduler.blocks.num_blocks


@pytest.mark.parametrize("fault", ["raises", "allows nothing"])
def test_a_mask_that_is_not_there_draws_nothing(setting: Setting, fault: str) -> None:
    class Faulty(Digits):
        def fill(self, row: Words) -> None:
            if len(self.taken) < 2:
                super().fill(row)
            elif fault == "raises":
                raise RuntimeError("a bug")

    run, constraint = Run(setting), Faulty(9)
    run(setting.request("a", 9, constraint=constraint), setting.request("b", 12, constraint=Digits(9)))
    assert run.tokens("a") == constraint.taken
    assert (len(constraint.taken), run.last("a").error) == (2, ErrorCode.GRAMMAR_STUCK)
    assert run.last("b").finish_reason is FinishReason.STOP


def test_a_failed_forward_pass_leaves_constraints_in_their_place(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is halved until the one at fault is alone; all masks are filled again, and no token is lost."""
    alone = Run(setting)
    alone(*mixed(setting, new_constraints()))
    forward = setting.model.forward

    def failing(batch: Any, kv: Any) -> Tensor:
        if len(batch.sequences.context_lens) > 2:
            raise RuntimeError("too many rows")
        return forward(batch, kv)

    monkeypatch.setattr(setting.model, "forward", failing)
    run, constraints = Run(setting), new_constraints()
    run(*mixed(setting, constraints))
    for name in alone.outputs:
        assert run.tokens(name) == alone.tokens(name)


def test_an_aborted_request_lets_its_constraint_go(setting: Setting) -> None:
    run, constraint = Run(setting), Digits(20)
    gone = weakref.ref(constraint)
    one = setting.request("a", 9, constraint=constraint)
    run.outputs["a"] = []
    run.engine.handle(Submit(one))
    for _ in range(4):
        run.step()
    assert len(constraint.taken) > 1
    run.engine.handle(Abort("a"))
    run.step()
    del one, constraint
    gc.collect()
    assert gone() is None


def test_a_stream_shows_the_last_token_of_a_text_that_is_whole() -> None:
    for ends_in_text, text in ((True, "ab"), (False, "a")):
        stream = RequestStream(Request("r", (1,), SamplingParams(max_tokens=9)), FakeTokenizer(), lambda *_: None)
        taken: list[Any] = []
        stream.listen(taken.append)
        stream.deliver(TokenOutput("r", (ord("a"),)))
        stream.deliver(TokenOutput("r", (ord("b"),), finish_reason=FinishReason.STOP, ends_in_text=ends_in_text))
        assert "".join(output.text for output in taken) == text


def test_threads_start_with_the_first_mask() -> None:
    filler = MaskFiller(100)
    assert filler.start([None, None]) is None
    assert filler._pool is None
    pending = filler.start([None, Digits(3), Digits(3)])
    assert pending is not None
    masks = pending.join()
    assert masks.rows == (1, 2)
    assert masks.words.shape == (2, 4)
    assert (masks.words == masks.words[0]).all()
