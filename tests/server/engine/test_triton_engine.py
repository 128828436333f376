"""The whole engine over the `triton` provider in Triton's interpreter: the reference's tokens.

Two-layer models; the same kernels, launches and buffers as on a GPU, but for the capture of CUDA graphs itself.
"""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.kernels import load_ops
from guanaco.kernels.layer_cache import CODE_LIMITS
from guanaco.kernels.lora_batch import LoraTable
from guanaco.kernels.triton import ops as triton_ops
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.loading.loader import load_model
from guanaco.server.engine import sampler
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.cuda_graphs import DecodeGraphs, RunEagerly
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner, StepRows
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Submit
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.adapters.tiny_adapters import make_adapter
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama
from support.server.answers import Answers, add_outputs, distance, tokens_of

pytest.importorskip("triton")

CPU = torch.device("cpu")
RANKS = {"x": 8, "y": 5}
NUM_TOKENS = 3
MAX_MODEL_LEN, BLOCK_SIZE, NUM_SLOTS, NUM_SEQS = 64, 8, 3, 5


def interpreted(dtype: torch.dtype = torch.float32) -> Any:
    return load_ops("triton", device=CPU, dtype=dtype)


class Setting(NamedTuple):
    reference: DecoderModel
    triton: DecoderModel
    registry: AdapterRegistry

    def loras(self, *names: str) -> tuple[LoraRef, ...]:
        versions = [self.registry.resolve(name) for name in names]
        return tuple(LoraRef(entry.version, 0.5 if len(names) > 1 else 1.0) for entry in versions if entry)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("triton"), intermediate_size=192)


def make_setting(root: Path, adapters: torch.dtype = torch.float32, **model_fields: Any) -> Setting:
    path = make_tiny_llama(root / "base", **model_fields)
    model = load_model(path, reference_ops()).model
    registry = AdapterRegistry(model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=64))
    for seed, (name, rank) in enumerate(RANKS.items()):
        registry.load(name, make_adapter(root / name, model.lora_targets, rank=rank, seed=seed, dtype=adapters))
    return Setting(model, load_model(path, interpreted()).model, registry)


def requests_of(setting: Setting, num_tokens: int = NUM_TOKENS) -> list[Request]:
    """The base, each adapter, both of them mixed, and an adapter again; prompts of 2 to 19 tokens."""
    rng = Random(3)
    users = ((), ("x",), ("y",), ("x", "y"), ("x",))
    return [
        Request(
            f"r{i}",
            tuple(rng.randrange(3, 384) for _ in range(length)),
            SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=1, return_logits=True),
            setting.loras(*names),
        )
        for i, (names, length) in enumerate(zip(users, (19, 2, 9, 4, 3), strict=True))
    ]


class Run:
    """An engine of its own over one of the two models."""

    def __init__(
        self, setting: Setting, model: DecoderModel, *, graphs: bool = False, cache: torch.dtype = torch.float32,
        num_blocks: int = 64,
    ) -> None:  # fmt: skip
        kv = PagedKVCache(model.config, num_blocks, BLOCK_SIZE, cache, CPU)
        store = SlotStore(model.lora_targets, NUM_SLOTS, CPU, model.ops.place_adapter)
        self.graphs, self.num_preempted, self.num_cached = None, 0, 0
        if graphs:
            sizes = {"max_num_seqs": NUM_SEQS, "max_model_len": MAX_MODEL_LEN, "num_slots": NUM_SLOTS}
            self.graphs = DecodeGraphs(model, model.ops, kv, **sizes, capture=RunEagerly())  # type: ignore[arg-type]
        runner = ModelRunner(model, kv, setting.registry, store, frozenset(), self.graphs)
        limits = Limits(NUM_SEQS, 16, min(MAX_MODEL_LEN, num_blocks * BLOCK_SIZE), queue_timeout_seconds=0.0)
        scheduler = Scheduler(
            limits, BlockManager(num_blocks, BLOCK_SIZE), ResidencyLedger(SlotTable(NUM_SLOTS)), frozenset()
        )
        self.engine = Engine(scheduler, runner, clock=lambda: 0.0)

    def __call__(self, requests: list[Request]) -> dict[str, list[int]]:
        return tokens_of(self.answers(requests))

    def answers(self, requests: list[Request]) -> Answers:
        answers: Answers = {}
        for one in requests:
            self.engine.handle(Submit(one))
        while self.engine.has_work:
            step = self.engine.step()
            self.num_preempted += step.stats.num_preempted
            self.num_cached += step.stats.prefix_hits_tokens
            add_outputs(answers, step.outputs)
        return answers


@pytest.fixture(scope="module")
def expected(setting: Setting) -> dict[str, list[int]]:
    return Run(setting, setting.reference)(requests_of(setting))


def test_mixed_adapters_chunked_prompts_and_decode_give_the_references_tokens(
    setting: Setting, expected: dict[str, list[int]]
) -> None:
    assert setting.triton.is_fused
    assert Run(setting, setting.triton)(requests_of(setting)) == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)
    assert all(len(tokens) == NUM_TOKENS for tokens in expected.values())


def test_decode_steps_over_fixed_buffers_give_the_same(setting: Setting, expected: dict[str, list[int]]) -> None:
    """What a CUDA graph replays, run eagerly: padded buckets, adapters as data, buffers used again."""
    run = Run(setting, setting.triton, graphs=True)
    assert run(requests_of(setting)) == expected
    assert run.graphs is not None
    assert run.graphs.num_graphs >= 2
    (mixture,) = requests_of(setting, num_tokens=2)[3:4]
    assert run([mixture]) == {"r3": expected["r3"][:2]}, "alone: two adapters for one row"


def test_rows_that_pad_a_bucket_write_nowhere(setting: Setting) -> None:
    """Three rows in a bucket of four: only their own slots of the cache change."""
    model: Any = setting.triton
    kv = PagedKVCache(model.config, 8, BLOCK_SIZE, model.ops.dtype, CPU)
    graphs = DecodeGraphs(model, model.ops, kv, max_num_seqs=4, max_model_len=16, num_slots=1, capture=RunEagerly())
    slots = [17, 33, 48]
    rows = StepRows([5, 6, 7], [1, 1, 0], slots, [[2], [4], [6]], [2, 2, 1], [0, 1, 2, 3], [0, 1, 2], [(), (), ()])
    assert graphs.forward(rows, LoraTable({})).shape[0] == 3
    for layer in range(model.config.num_layers):
        for tensor in kv.layer(layer).tensors:
            written = tensor.flatten(0, 1).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert written == slots


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Rows that groups of 64 cross: weights that are multiplied in float32; and adapters in the form that is kept."""
    return make_setting(tmp_path_factory.mktemp("odd"), adapters=torch.float16, kind="odd")


def test_tokens_are_drawn_where_the_logits_are(odd: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise, filters, penalties and a greedy row among them: what the sampler draws for the reference."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.9}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0},
        {"temperature": 1.5, "top_k": 20, "frequency_penalty": 0.5}, {"temperature": 1.0, "min_p": 0.05},
    ]  # fmt: skip
    requests = [
        replace(one, params=replace(one.params, seed=7 + i, **ways[i])) for i, one in enumerate(requests_of(odd))
    ]
    expected = Run(odd, odd.reference)(requests)
    monkeypatch.setattr(sampler, "_draw", None)  # the host's, which would need all of them
    assert Run(odd, odd.triton)(requests) == expected
    assert expected != Run(odd, odd.reference)(requests_of(odd)), "the noise did play a part"


# ---- caches of 8 bits


EIGHT_BITS = pytest.mark.parametrize("cache", CODE_LIMITS, ids=str)
# How far a logit may be off: 1e-6 as a rule, with the same codes, but a number between two codes may get the other one
# where its last bit differs (1.7e-3 was seen, int8). What rounding to codes itself does here: 2e-2 and 9e-2.
ONE_CODE = {torch.int8: 5e-3, torch.float8_e4m3fn: 2e-2}


@EIGHT_BITS
def test_a_cache_of_8_bits_is_the_references(odd: Setting, cache: torch.dtype) -> None:
    """Adapters mixed, prompts in chunks, decoding; products are in float32, so that nothing but the cache rounds."""
    requests = requests_of(odd)
    plain = Run(odd, odd.reference).answers(requests)
    expected = Run(odd, odd.reference, cache=cache).answers(requests)
    assert distance(expected, plain).largest_error > 3 * ONE_CODE[cache], "the reference does round"
    run = Run(odd, odd.triton, cache=cache)
    found = run.answers(requests)
    assert distance(found, expected).largest_error <= ONE_CODE[cache]
    assert tokens_of(found) == tokens_of(expected)
    assert tokens_of(run.answers(requests)) == tokens_of(expected), "prompts from the prefix cache"


@EIGHT_BITS
def test_a_preempted_sequence_writes_the_same_codes_again(odd: Setting, cache: torch.dtype) -> None:
    requests = requests_of(odd, num_tokens=9)
    expected = Run(odd, odd.reference, cache=cache).answers(requests)
    run = Run(odd, odd.triton, cache=cache, num_blocks=5)
    found = run.answers(requests)
    assert run.num_preempted
    assert distance(found, expected).largest_error <= ONE_CODE[cache]
    assert tokens_of(found) == tokens_of(expected)


def test_fused_layers_write_and_read_8_bits(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over fixed buffers, against the same engine whose cache is the reference's business. All rows take the kernel
    for 5 to 64, which is the fastest to interpret."""
    cache = torch.int8
    monkeypatch.setattr(triton_ops, "SIMT_ROWS", 0)
    requests, ops, reference = requests_of(setting), setting.triton.ops, setting.reference.ops
    found = Run(setting, setting.triton, graphs=True, cache=cache).answers(requests)
    for name in ("rope_and_cache", "paged_attention"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    expected = Run(setting, setting.triton, cache=cache).answers(requests)
    assert distance(found, expected).largest_error <= ONE_CODE[cache]
    assert tokens_of(found) == tokens_of(expected)


@pytest.fixture(scope="module", params=["mistral", "qwen2", "qwen3"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Of an odd size, as `odd`: not fused, products in float32."""
    fields = {"mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 16}}[request.param]
    sizes = {"kind": "odd", "num_hidden_layers": 1}
    return make_setting(tmp_path_factory.mktemp("other"), model_type=request.param, **sizes, **fields)


@EIGHT_BITS
def test_other_architectures_have_the_references_tokens_in_8_bits(other: Setting, cache: torch.dtype) -> None:
    requests = requests_of(other, num_tokens=2)[2:3]
    expected = Run(other, other.reference, cache=cache).answers(requests)
    plain = Run(other, other.reference).answers(requests)
    assert distance(expected, plain).largest_error > ONE_CODE[cache], "the reference does round"
    found = Run(other, other.triton, cache=cache).answers(requests)
    assert distance(found, expected).largest_error <= ONE_CODE[cache]
    assert tokens_of(found) == tokens_of(expected)


@pytest.mark.parametrize("cache", [torch.float32, *CODE_LIMITS], ids=str)
def test_other_architectures_give_the_same_tokens_from_the_prefix_cache(other: Setting, cache: torch.dtype) -> None:
    requests = requests_of(other)
    run = Run(other, other.reference, cache=cache)
    first = run(requests)
    before = run.num_cached
    assert run(requests) == first
    assert run.num_cached - before >= 2 * BLOCK_SIZE
