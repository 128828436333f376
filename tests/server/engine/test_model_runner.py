"""The engine over a real small model: what clients get is what one sequence alone would get, however it was run.

Greedy tokens are compared with a plain loop over the same model (`PagedRun`), log-probabilities with transformers.
"""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.messages import ForgetVersion
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.loading.loader import load_model
from guanaco.server.engine import model_runner
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.engine.request import FinishReason, LoraRef, Request, SamplingParams, StepStats, Submit, TokenOutput
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.adapters.tiny_adapters import make_adapter
from support.models.oracles import PagedRun, oracle_logits, reference_ops, transformers_oracle
from support.models.tiny_models import make_tiny_llama

CPU = torch.device("cpu")
ADAPTERS = ("x", "y", "z")


class Setting(NamedTuple):
    model: DecoderModel
    registry: AdapterRegistry
    path: Path

    def version(self, name: str) -> str:
        entry = self.registry.resolve(name)
        assert entry is not None
        return entry.version


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("runner")
    path = make_tiny_llama(root / "base", kind="gqa")
    model = load_model(path, reference_ops()).model
    registry = AdapterRegistry(model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=64))
    for seed, name in enumerate(ADAPTERS):
        registry.load(name, make_adapter(root / name, model.lora_targets, rank=2 + 3 * seed, seed=seed))
    return Setting(model, registry, path)


class Run:
    """An engine of its own over the shared model, run until its requests are done."""

    def __init__(
        self, setting: Setting, *, num_blocks: int = 200, num_slots: int = 4, budget: int = 64, num_seqs: int = 8
    ) -> None:
        kv = PagedKVCache(setting.model.config, num_blocks, 4, torch.float32, CPU)
        store = SlotStore(setting.model.lora_targets, num_slots, CPU)
        self.runner = ModelRunner(setting.model, kv, setting.registry, store, frozenset())
        limits = Limits(num_seqs, budget, max_model_len=128, queue_timeout_seconds=0.0)
        self.scheduler = Scheduler(
            limits, BlockManager(num_blocks, 4), ResidencyLedger(SlotTable(num_slots)), frozenset()
        )
        self.engine = Engine(self.scheduler, self.runner, clock=lambda: 0.0)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.steps: list[StepStats] = []

    def __call__(self, *requests: Request) -> dict[str, list[int]]:
        for one in requests:
            self.outputs[one.request_id] = []
            self.engine.handle(Submit(one))
        while self.engine.has_work:
            step = self.engine.step()
            self.steps.append(step.stats)
            for output in step.outputs:
                self.outputs[output.request_id].append(output)
        for one in requests:
            assert self.outputs[one.request_id][-1].finish_reason is FinishReason.LENGTH
        return {one.request_id: self.tokens(one.request_id) for one in requests}

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    rng = Random(seed)
    return tuple(rng.randrange(3, 384) for _ in range(length))


def request(
    setting: Setting, name: str, prompt: tuple[int, ...], *adapters: str, scale: float = 1.0, **fields: Any
) -> Request:
    params = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, "seed": 7, **fields})
    return Request(name, prompt, params, tuple(LoraRef(setting.version(a), scale) for a in adapters))


def greedy_alone(setting: Setting, wanted: Request) -> list[int]:
    """The same sequence with nothing of an engine: whole prompt, then one token at a time."""
    run = PagedRun(setting.model, seed=5)
    store = SlotStore(setting.model.lora_targets, len(wanted.loras) or 1, CPU)
    for slot, lora in enumerate(wanted.loras):
        store.load(slot, setting.registry.host_copy(lora.version))
    entries = tuple((slot, lora.scale) for slot, lora in enumerate(wanted.loras))
    tokens, new = [], list(wanted.prompt_token_ids)
    for _ in range(wanted.params.max_tokens):
        lora = LoraBatch.build([entries] * len(new), store.table, CPU) if entries else None
        new = [int(run.step([(0, new)], lora=lora)[0].argmax())]
        tokens += new
    return tokens


def mixed_requests(setting: Setting, **fields: Any) -> list[Request]:
    """Base, each adapter, two at once and scaled ones; prompts from one token to two chunks."""
    kinds: list[tuple[str, ...]] = [(), ("x",), ("y",), (), ("z",), ("x", "z"), ("y",), ("x",), ()]
    lengths = (1, 17, 30, 64, 5, 40, 2, 75, 33)
    return [
        request(setting, f"r{i}", prompt_of(i, n), *kind, scale=1.0 if i < 6 else 0.5, **fields)
        for i, (kind, n) in enumerate(zip(kinds, lengths, strict=True))
    ]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "together"),
        ({"budget": 16}, "in small chunks"),
        ({"num_blocks": 32}, "with preemption"),
        ({"num_slots": 2}, "with fewer slots than adapters"),
        ({"num_slots": 2, "num_blocks": 32, "budget": 9}, "all of these"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_each_gets_what_it_would_get_alone(setting: Setting, options: dict[str, int], what: str) -> None:
    run = Run(setting, **options)
    wanted = mixed_requests(setting)
    got = run(*wanted)
    for one in wanted:
        assert got[one.request_id] == greedy_alone(setting, one), f"{one.request_id}, {what}"
    preempted = sum(stats.num_preempted for stats in run.steps)
    assert (preempted > 0) == ("num_blocks" in options), "the case that was meant to be tried"
    assert len({tuple(tokens) for tokens in got.values()}) == len(wanted), "different requests, different answers"


def test_a_prefix_that_is_found_changes_nothing(setting: Setting) -> None:
    run = Run(setting)
    prompt = prompt_of(1, 50)
    first = run(request(setting, "a", prompt, "x"))["a"]
    again = run(request(setting, "b", prompt, "x"), request(setting, "c", prompt), request(setting, "d", prompt, "y"))
    found = {name: run.outputs[name][0].num_cached_tokens for name in "abcd"}
    assert found == {"a": 0, "b": 48, "c": 0, "d": 0}, "an adapter's keys and values are its own"
    assert again["b"] == first
    for name, adapters in (("c", ()), ("d", ("y",))):
        assert again[name] == greedy_alone(setting, request(setting, name, prompt, *adapters))


def test_logits_are_those_of_who_asked(setting: Setting) -> None:
    """Of the row that the token is drawn from, in company, after prompts of several lengths."""
    run = Run(setting)
    wanted = [
        request(setting, f"r{i}", prompt_of(i, 5 + i), *kind, max_tokens=1, return_logits=i > 0)
        for i, kind in enumerate([(), ("x",), (), ("y",)])
    ]
    got = run(*wanted)
    for one in wanted:
        (output,) = run.outputs[one.request_id]
        if not one.params.return_logits:
            assert output.logits is None
            continue
        assert output.logits is not None
        logits = torch.frombuffer(bytearray(output.logits), dtype=torch.float32)
        assert int(logits.argmax()) == got[one.request_id][0]
        alone = PagedRun(setting.model, seed=5)
        store = SlotStore(setting.model.lora_targets, 1, CPU)
        for lora in one.loras:
            store.load(0, setting.registry.host_copy(lora.version))
        batch = LoraBatch.build([((0, 1.0),)] * len(one.prompt_token_ids), store.table, CPU) if one.loras else None
        expected = alone.step([(0, list(one.prompt_token_ids))], lora=batch)[0]
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_forgotten_adapter_leaves_the_device(setting: Setting) -> None:
    run = Run(setting)
    first = run(request(setting, "a", prompt_of(1, 9), "x"))["a"]
    store = run.runner._slots
    assert store.num_bytes > 0
    run.engine.handle(ForgetVersion(setting.version("x")))
    assert store.num_bytes == 0
    assert run(request(setting, "b", prompt_of(1, 9), "x"))["b"] == first, "and comes back when it is wanted"


def test_a_seed_draws_the_same_in_any_company(setting: Setting) -> None:
    """Sampled, with every filter: alone, among changing others, under preemption, in small chunks."""
    fields = {"temperature": 1.3, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 99}
    wanted = request(setting, "wanted", prompt_of(50, 21), "y", **fields)
    alone = Run(setting)(wanted)["wanted"]
    assert alone != Run(setting)(replace(wanted, params=replace(wanted.params, seed=100)))["wanted"]
    for seed in range(6):
        rng = Random(seed)
        others = [
            request(
                setting, f"o{i}", prompt_of(i + 100 * seed, rng.randint(1, 60)), *rng.choice(((), ("x",), ("z",))),
                temperature=rng.choice((0.0, 1.0)), seed=i, max_tokens=rng.randint(1, 40),
            )
            for i in range(8)
        ]  # fmt: skip
        others.insert(rng.randrange(9), wanted)
        run = Run(setting, num_blocks=rng.choice((40, 200)), budget=rng.choice((10, 64)), num_slots=2)
        assert run(*others)["wanted"] == alone


def test_logprobs_are_the_models(setting: Setting) -> None:
    """Of the output and of the prompt, in one chunk and in many, and after preemption: transformers' numbers."""
    oracle = transformers_oracle(setting.path)
    prompt = prompt_of(3, 41)
    one = request(setting, "r", prompt, logprobs=4, prompt_logprobs=3, max_tokens=30)
    fillers = [request(setting, f"f{i}", prompt_of(60 + i, 30), max_tokens=40) for i in range(4)]
    for options, others in (({}, []), ({"budget": 8}, []), ({"num_blocks": 32}, fillers)):
        run = Run(setting, **options)
        tokens = run(*others, one)["r"]
        expected = torch.log_softmax(oracle_logits(oracle, [*prompt, *tokens]).double(), dim=-1)
        assert sum(s.num_preempted for s in run.steps) > 0 or "num_blocks" not in options
        prompt_logprobs = [entry for output in run.outputs["r"] for entry in output.prompt_logprobs]
        logprobs = [entry for output in run.outputs["r"] for entry in output.logprobs]
        assert [entry.token_id for entry in prompt_logprobs] == list(prompt[1:])
        assert [entry.token_id for entry in logprobs] == tokens
        for num_top, position, entry in (
            *((3, i, entry) for i, entry in enumerate(prompt_logprobs)),
            *((4, len(prompt) - 1 + i, entry) for i, entry in enumerate(logprobs)),
        ):
            row = expected[position]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            values, ids = row.topk(num_top)
            assert [token for token, _ in entry.top] == ids.tolist()
            if num_top == 3:  # of the prompt
                places = {token: place for place, token in enumerate(ids.tolist(), start=1)}
                assert entry.rank == places.get(entry.token_id, max(entry.rank, num_top + 1))
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_a_scored_prompt_is_the_models(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is generated: base and adapters at once, in one chunk and in many, preempted, cached before, few rows of
    logits at a time; the numbers are those of a request that generates, and the greedy ones are exactly the largest."""
    lengths = {"a": 1, "b": 2, "c": 41, "d": 60, "e": 128}  # the last one fills the context
    adapters: dict[str, tuple[str, ...]] = {"a": (), "b": ("x",), "c": (), "d": ("y", "z"), "e": ("x",)}

    def requests(max_tokens: int, **fields: Any) -> list[Request]:
        return [
            request(setting, name, prompt_of(i, length), *adapters[name], max_tokens=max_tokens, **fields)
            for i, (name, length) in enumerate(lengths.items())
        ]

    known = Run(setting)
    known(*[r for r in requests(1, prompt_logprobs=2) if r.request_id != "e"])
    oracle = transformers_oracle(setting.path)
    expected = torch.log_softmax(oracle_logits(oracle, prompt_of(2, 41)).double(), dim=-1)
    for options, at_once in (({}, 10**6), ({"budget": 8}, 3), ({"num_blocks": 40}, 1), ({"num_slots": 2}, 64)):
        monkeypatch.setattr(model_runner, "_SCORED_LOGITS_BYTES", at_once * 4 * setting.model.config.vocab_size)
        run = Run(setting, **options)
        rows = []
        original = setting.model.logits
        monkeypatch.setattr(setting.model, "logits", lambda h, f=original, seen=rows: (seen.append(len(h)), f(h))[1])
        run(*[replace(r, request_id=f"{r.request_id} before") for r in requests(1)[:4]])  # leaves blocks to be found
        rows.clear()
        assert run(*requests(0, prompt_logprobs=2)) == {name: [] for name in lengths}
        monkeypatch.setattr(setting.model, "logits", original)
        assert max(rows) <= at_once
        for name, length in lengths.items():
            entries = [entry for output in run.outputs[name] for entry in output.prompt_logprobs]
            prompt = run.outputs[name], prompt_of(list(lengths).index(name), length)[1:]
            assert [entry.token_id for entry in entries] == list(prompt[1])
            assert run.outputs[name][-1].finish_reason is FinishReason.LENGTH
            if name != "e":
                before = [entry for output in known.outputs[name] for entry in output.prompt_logprobs]
                assert [e.logprob for e in entries] == pytest.approx([e.logprob for e in before], abs=1e-4)
            for entry in entries:
                assert (entry.logprob == entry.top[0][1]) == (entry.token_id == entry.top[0][0])
        numbers = [entry.logprob for output in run.outputs["c"] for entry in output.prompt_logprobs]
        wanted = [float(expected[i][token]) for i, token in enumerate(prompt_of(2, 41)[1:])]
        assert numbers == pytest.approx(wanted, abs=1e-3)


def test_a_scored_prompt_that_is_no_number_fails_alone(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    original = setting.model.logits
    run = Run(setting)
    monkeypatch.setattr(setting.model, "logits", lambda h: original(h) * (float("nan") if len(h) == 8 else 1))
    run.engine.handle(Submit(request(setting, "bad", prompt_of(1, 9), max_tokens=0, prompt_logprobs=1)))
    run.outputs["bad"] = []
    run(request(setting, "good", prompt_of(2, 12), max_tokens=0, prompt_logprobs=1))
    assert run.outputs["bad"][-1].error == "numerical_error"


def test_a_probe_runs_the_model_and_disturbs_nobody(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = mixed_requests(setting)
    quiet = Run(setting)(*wanted)
    run = Run(setting)
    original = run.runner.run

    def probing(*arguments: Any) -> Any:
        run.runner.probe()
        return original(*arguments)

    monkeypatch.setattr(run.runner, "run", probing)
    assert run(*wanted) == quiet

    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(setting.model, "forward", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run.runner.probe()


def test_a_model_that_is_not_a_number_ends_that_request(setting: Setting) -> None:
    """An adapter whose numbers overflow ends the requests that use it; the base beside them is untouched."""
    wanted = request(setting, "base", prompt_of(8, 20))
    huge = request(setting, "huge", prompt_of(9, 20), "x", scale=1e38)
    run = Run(setting)
    run.engine.handle(Submit(huge))
    run.outputs["huge"] = []
    assert run(wanted)["base"] == greedy_alone(setting, wanted)
    assert run.outputs["huge"][-1].error == "numerical_error"
    assert len(run.outputs["huge"]) == 1
