"""Drafts change how many tokens a step gives, never which: over a real small model, for every sampling parameter."""

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

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
from guanaco.server.engine.constraints import AllowedTokens, Words
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Submit, TokenOutput
from guanaco.server.engine.scheduler import Limits, Scheduler
from guanaco.server.engine.speculation.step_drafts import Drafting
from support.adapters.tiny_adapters import make_adapter
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama
from support.simulation.oracle_drafts import SPOILS, OracleDrafts, always_right, always_wrong

CPU = torch.device("cpu")
EOS = 2


class Steps:
    """A constraint that can be worked out by hand: each token is one of five by its place, up to `length` of them."""

    def __init__(self, length: int) -> None:
        self.error: ErrorCode | None = None
        self.is_complete = False
        self.length = length
        self.taken: list[int] = []
        self.num_filled_ahead = 0

    def _at(self, place: int) -> list[int]:
        return [20 + 5 * place + i for i in range(5)]

    def is_end(self, token_id: int) -> bool:
        return token_id == EOS

    def fill(self, row: Words) -> None:
        self._fill(row, len(self.taken))

    def _fill(self, row: Words, place: int) -> None:
        flags = np.zeros(len(row) * 32, dtype=np.bool_)
        flags[self._at(place)] = True
        row[:] = np.packbits(flags, bitorder="little").view(np.int32)

    def fill_ahead(self, draft: Sequence[int], rows: Words) -> None:
        self.num_filled_ahead += 1
        rows[:] = -1
        for place in range(1 + self.num_allowed(draft)):
            if len(self.taken) + place < self.length:
                self._fill(rows[place], len(self.taken) + place)

    def num_allowed(self, draft: Sequence[int]) -> int:
        first = len(self.taken)
        places = (i for i, token in enumerate(draft) if token not in self._at(first + i) or first + i == self.length)
        return next(places, len(draft))

    def forced(self) -> bytes:
        return b""

    def accept(self, token_id: int) -> None:
        assert token_id in self._at(len(self.taken)), "each drawn token comes once, in order"
        self.taken.append(token_id)
        self.is_complete = len(self.taken) == self.length


class FailsAhead(Steps):
    """Its masks within a draft fail, as at a limit that a text which nobody wrote may reach."""

    def fill_ahead(self, draft: Sequence[int], rows: Words) -> None:
        self.num_filled_ahead += 1
        self.fill(rows[0])
        rows[1:] = 0


class Setting(NamedTuple):
    model: DecoderModel
    registry: AdapterRegistry

    def loras(self, *names: str) -> tuple[LoraRef, ...]:
        entries = [self.registry.resolve(name) for name in names]
        return tuple(LoraRef(entry.version) for entry in entries if entry is not None)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("speculation")
    model = load_model(make_tiny_llama(root / "base", kind="gqa"), reference_ops()).model
    registry = AdapterRegistry(model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=64))
    for seed, name in enumerate(("x", "y")):
        registry.load(name, make_adapter(root / name, model.lora_targets, rank=3, seed=seed))
    return Setting(model, registry)


class Run:
    """An engine of its own over the shared model. `drafting`: where its drafts come from."""

    def __init__(
        self, setting: Setting, drafting: Drafting | None = None, *, num_blocks: int = 200, budget: int = 64
    ) -> None:
        kv = PagedKVCache(setting.model.config, num_blocks, 4, torch.float32, CPU)
        store = SlotStore(setting.model.lora_targets, 2, CPU)
        runner = ModelRunner(setting.model, kv, setting.registry, store, frozenset({EOS}))
        limits = Limits(8, budget, max_model_len=96, queue_timeout_seconds=0.0)
        self.blocks = BlockManager(num_blocks, 4)
        scheduler = Scheduler(limits, self.blocks, ResidencyLedger(SlotTable(2)), frozenset({EOS}))
        scheduler.drafting = drafting
        self.engine = Engine(scheduler, runner, clock=lambda: 0.0)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.num_drafted = self.num_accepted = self.num_preempted = self.num_steps = 0

    def __call__(self, *requests: Request) -> "Run":
        for one in requests:
            self.outputs[one.request_id] = []
            self.engine.handle(Submit(one))
        while self.engine.has_work:
            step = self.engine.step()
            self.num_steps += 1
            self.num_preempted += step.stats.num_preempted
            self.num_drafted += sum(outcome.num_drafted for outcome in step.stats.drafts)
            self.num_accepted += sum(outcome.num_accepted for outcome in step.stats.drafts)
            for output in step.outputs:
                self.outputs[output.request_id].append(output)
            self.blocks.check(self.engine.scheduler.running)
        return self

    def answers(self) -> dict[str, list[int]]:
        return {name: [t for output in found for t in output.token_ids] for name, found in self.outputs.items()}


def request(name: str, length: int, loras: tuple[LoraRef, ...] = (), constraint: Any = None, **fields: Any) -> Request:
    prompt = tuple(Random(length).sample(range(3, 300), length))
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.0, "seed": 7, **fields})
    return Request(name, prompt, params, loras, constraint=constraint)


def everything(setting: Setting) -> list[Request]:
    """One request for each thing that decides a token or an end."""
    x, y = setting.loras("x"), setting.loras("y")
    return [
        request("greedy", 9),
        request("adapter", 14, x),
        request("mixture", 5, (*x, *y)),
        request("seeded", 7, temperature=1.0),
        request("filtered", 11, y, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01),
        request("penalties", 6, temperature=1.0, presence_penalty=0.5, frequency_penalty=1.5, repetition_penalty=1.3),
        request("bias", 6, temperature=1.5, logit_bias=((9, 4.0), (11, -100.0))),
        request("allowed", 8, temperature=1.0, allowed=AllowedTokens.of(range(40, 60))),
        request("bad words", 8, temperature=0.6, bad_words=((7,), (8, 9))),
        request("late end", 8, temperature=3.0, min_tokens=12, stop_token_ids=frozenset(range(100, 200))),
        request("stop token", 8, temperature=3.0, min_tokens=2, stop_token_ids=frozenset(range(100, 140))),
        request("end", 12, temperature=2.0, logit_bias=((EOS, 4.0),)),
        request("scored", 10, x, logprobs=3, prompt_logprobs=1),
        request("one token", 4, max_tokens=1),
        request("full context", 70, max_tokens=90),
        request("long", 60, temperature=1.0, max_tokens=30),
        request("constraint", 9, constraint=Steps(17)),
        request("sampled constraint", 9, x, constraint=Steps(30), temperature=1.5),
    ]


def as_clients_see(run: Run) -> dict[str, Any]:
    """All that outputs say, but for log-probabilities' last digits: torch's products round by the number of rows."""
    return {
        name: [
            (
                output.token_ids,
                output.finish_reason,
                output.stop_reason,
                output.ends_in_text,
                output.error,
                [(p.token_id, [t for t, _ in p.top]) for p in output.logprobs],
            )
            for output in found
            if output.token_ids or output.finish_reason
        ]
        for name, found in run.outputs.items()
    }


def logprobs_of(run: Run) -> list[float]:
    """Those of the prompt, which comes in one piece or in several, and of the answer."""
    outputs = run.outputs["scored"]
    return [p.logprob for o in outputs for p in o.prompt_logprobs] + [p.logprob for o in outputs for p in o.logprobs]


@pytest.fixture(scope="module")
def plain(setting: Setting) -> Run:
    return Run(setting)(*everything(setting))


@pytest.mark.parametrize("spoil", SPOILS)
def test_drafts_change_no_token(setting: Setting, plain: Run, spoil: str) -> None:
    """Right, wrong and random drafts, across ends and stop tokens, for everything that decides a token."""
    assert {output[-1].finish_reason for output in plain.outputs.values()} >= {"stop", "length"}
    drafts = OracleDrafts(plain.answers(), SPOILS[spoil], seed=3)
    requests = everything(setting)
    run = Run(setting, drafts)(*requests)
    assert as_clients_see(run) == as_clients_see(plain)
    assert logprobs_of(run) == pytest.approx(logprobs_of(plain), abs=1e-4)
    assert run.num_drafted > 100
    assert (run.num_accepted == 0) == (spoil == "always_wrong")
    assert run.num_steps <= plain.num_steps
    assert sorted(drafts.forgotten) == list(range(len(requests))), "each record is dropped at its request's end"
    ahead = [r.constraint.num_filled_ahead for r in requests if r.constraint is not None]
    assert all(ahead), "the masks of drafts were filled"


def test_drafts_change_no_token_without_room(setting: Setting, plain: Run) -> None:
    """The same with chunked prompts, with too few blocks for all (sequences are preempted), and prefix hits."""
    drafts = OracleDrafts(plain.answers(), SPOILS["right_at_first"], seed=4)
    run = Run(setting, drafts, num_blocks=32, budget=18)
    run(*everything(setting))
    assert run.num_preempted > 0
    assert run.num_accepted > 30
    assert as_clients_see(run) == as_clients_see(plain)
    run(*everything(setting))
    assert as_clients_see(run) == as_clients_see(plain)
    assert logprobs_of(run) == pytest.approx(logprobs_of(plain), abs=1e-4)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_failure_within_a_draft_ends_no_request(setting: Setting, spoil: str) -> None:
    plain = Run(setting)(request("a", 9, constraint=Steps(17)))
    failing = FailsAhead(17)
    run = Run(setting, OracleDrafts(plain.answers(), SPOILS[spoil], seed=3))(request("a", 9, constraint=failing))
    assert failing.num_filled_ahead > 0
    assert as_clients_see(run) == as_clients_see(plain)


def test_right_drafts_save_steps(setting: Setting) -> None:
    wanted = request("a", 9)
    plain = Run(setting)(wanted)
    run = Run(setting, OracleDrafts(plain.answers(), always_right, least=5))(wanted)
    assert run.num_steps < plain.num_steps / 3
    assert run.answers() == plain.answers()


def test_a_request_may_forbid_drafts(setting: Setting) -> None:
    run = Run(setting, OracleDrafts({"a": []}, always_wrong, least=5))(request("a", 9, speculation=False))
    assert run.num_drafted == 0


def test_a_pass_that_fails_with_a_draft_is_tried_without(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory suffices for a token and not for its draft."""
    wanted = request("a", 9)
    plain = Run(setting)(wanted)
    run = Run(setting, OracleDrafts(plain.answers(), always_right, least=2))
    forward = setting.model.forward

    def small_only(batch: Any, kv: Any) -> Any:
        if 1 < len(batch.token_ids) < 9:
            raise MemoryError
        return forward(batch, kv)

    monkeypatch.setattr(setting.model, "forward", small_only)
    run(wanted)
    assert run.num_drafted > 10
    assert run.answers() == plain.answers()
