"""Random LLaMAs of Guanaco's sizes, and an engine over one. `gpu_check.py` compares and times them.

Weights are random codes and scales: no checkpoint is needed, and a step reads as many bytes as with the real model.
Adapters are real PEFT directories.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.kernels import nf4
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.architectures.registry import build_model
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.cuda_graphs import CudaCapture, DecodeGraphs, RunEagerly
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, StepOutput, Submit
from guanaco.server.engine.scheduler import Limits, Scheduler
from support.adapters.tiny_adapters import make_adapter
from support.server.answers import Answers, add_outputs

TINY = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, max_position_embeddings=512, tie_word_embeddings=False,
    attention_bias=False, mlp_bias=False, bos_token_id=1, eos_token_ids=(2,), quantization="nf4",
)  # fmt: skip


def _guanaco(hidden: int, intermediate: int, layers: int) -> ModelConfig:
    """The shape of LLaMA-1 in one of Guanaco's sizes (QLoRA, table 6): heads of 128, no grouped-query attention."""
    return replace(
        TINY, vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, num_layers=layers,
        num_heads=hidden // 128, num_kv_heads=hidden // 128, head_dim=128, max_position_embeddings=2048,
    )  # fmt: skip


SIZES = {
    "tiny": TINY,
    "7b": _guanaco(4096, 11008, 32),
    "13b": _guanaco(5120, 13824, 40),
    "33b": _guanaco(6656, 17920, 60),
    "65b": _guanaco(8192, 22016, 80),
}
BLOCK_SIZE = 16


class RandomWeights:
    """A `WeightSource`: the same seed gives the same model on every device."""

    def __init__(self, *, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, name: str, shape: tuple[int, int]) -> nf4.Nf4Weight | Tensor:
        n, k = shape
        if name.startswith("lm_head"):
            return (4.0 * self._randn(shape) / k**0.5).half()
        # With equally likely codes the root mean square of NF4's levels is 0.55. This scale makes a product about as
        # large as its input.
        groups, scale = n * k // 64, 1.5 / (0.55 * k**0.5)
        return nf4.Nf4Weight(
            self._bytes(n * k // 2), self._bytes(groups), shape, torch.bfloat16,
            torch.full((-(-groups // 256),), 0.3 * scale), nf4.dynamic_map(torch.device("cpu")), scale,
        )  # fmt: skip

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = self._randn(shape)
        return (1 + 0.2 * values if "norm" in name else values).half()

    def _bytes(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=self._generator)

    def _randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self._generator)


def random_model(size: str, ops: Any, *, seed: int = 0) -> DecoderModel:
    return build_model(SIZES[size], RandomWeights(seed=seed), ops)


def random_adapters(folder: Path, model: DecoderModel, ranks: Sequence[int]) -> AdapterRegistry:
    """Adapters a0, a1, … on all projections, in float16, of these ranks."""
    registry = AdapterRegistry(
        model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=max(ranks, default=1))
    )
    for i, rank in enumerate(ranks):
        path = make_adapter(folder / f"a{i}", model.lora_targets, rank=rank, alpha=rank, seed=i, dtype=torch.float16)
        registry.load(f"a{i}", path)
    return registry


@dataclass
class Streams:
    """An engine with room for `num_seqs` streams of `context` tokens, and methods that run requests on it."""

    engine: Engine
    registry: AdapterRegistry
    vocab_size: int
    graphs: DecodeGraphs | None
    keep_logits: bool = False  # copies all logits of a step to the host
    _number: int = 0

    @staticmethod
    def over(
        model: DecoderModel,
        registry: AdapterRegistry,
        *,
        num_seqs: int,
        context: int,
        chunk: int,
        graphs: bool,
        cache: torch.dtype | None = None,
    ) -> "Streams":
        """cache: dtype of K and V; None: that of the activations."""
        ops: Any = model.ops
        num_blocks = num_seqs * (-(-context // BLOCK_SIZE) + 1) + 1  # no request has to wait, and none is preempted
        slots = max(1, len(registry.entries()))
        kv = PagedKVCache(model.config, num_blocks, BLOCK_SIZE, cache or ops.dtype, ops.device)
        store = SlotStore(model.lora_targets, slots, ops.device, ops.place_adapter)
        path = None
        if graphs:
            capture = CudaCapture() if ops.device.type == "cuda" else RunEagerly()
            path = DecodeGraphs(
                model, ops, kv, max_num_seqs=num_seqs, max_model_len=context, num_slots=slots, capture=capture
            )
        runner = ModelRunner(model, kv, registry, store, frozenset(), path)
        limits = Limits(num_seqs, chunk, max_model_len=context, queue_timeout_seconds=0.0)
        scheduler = Scheduler(
            limits, BlockManager(num_blocks, BLOCK_SIZE), ResidencyLedger(SlotTable(slots)), frozenset()
        )
        return Streams(Engine(scheduler, runner, clock=lambda: 0.0), registry, model.config.vocab_size, path)

    def request(self, prompt: int, max_tokens: int, *adapters: str) -> str:
        """Add a greedy request with a random prompt of this length, the same for the n-th request of any engine."""
        rng = random.Random(self._number)
        ids = tuple(rng.randrange(3, self.vocab_size) for _ in range(prompt))
        entries = [self.registry.resolve(name) for name in adapters]
        loras = tuple(LoraRef(entry.version, 1.0 / len(entries)) for entry in entries if entry is not None)
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True, return_logits=self.keep_logits
        )
        name = f"r{self._number}"
        self._number += 1
        self.engine.handle(Submit(Request(name, ids, params, loras)))
        return name

    def run(self) -> None:
        """Run steps until no request is left."""
        while self.engine.has_work:
            self._step()

    def answers(self) -> Answers:
        """Run all requests, and return their tokens and logits. Needs `keep_logits`."""
        answers: Answers = {}
        while self.engine.has_work:
            add_outputs(answers, self._step().outputs)
        return answers

    def _step(self) -> StepOutput:
        done = self.engine.step()
        for output in done.outputs:
            if output.error is not None:
                raise RuntimeError(f"{output.request_id}: {output.error}")
        return done

    def prompt_rate(self, length: int) -> float:
        """Prompt tokens a second, to the first token."""
        self.request(length, 1)
        started = time.perf_counter()
        self.run()
        return length / (time.perf_counter() - started)

    def step_seconds(self, count: int, prompt: int, steps: int, adapters: Sequence[str] = ()) -> float:
        """Median seconds of `steps` steps in which `count` streams decode; stream i has adapter i mod their number.

        The streams may start one step after the other, so each generates `count` more tokens.
        """
        for i in range(count):
            self.request(prompt, steps + 2 + count, *([adapters[i % len(adapters)]] if adapters else []))
        times = []
        while self.engine.has_work:
            started = time.perf_counter()
            done = self._step()
            if len(done.outputs) == count == done.stats.num_scheduled_tokens and len(times) < steps:
                times.append(time.perf_counter() - started)
        return sorted(times)[len(times) // 2]
