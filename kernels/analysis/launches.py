"""The launches of the `triton` provider on a GPU that this machine doesn't have, recorded by running the provider with
tensors without memory.

Triton is told that a card of the target exists and is asked not to compile; torch's tensors are on its meta device. A
launch goes through the wrappers' own choices and Triton's own binder. So types, constants, options and divisibility by
16 are those of a real launch. Knows the models' shapes and the steps of a server. Called by `guanaco bench kernels` and
the tests of machine code, in processes without TRITON_INTERPRET.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraTable
from guanaco.kernels.ops import NORMS, PROJECTIONS, Draw, LayerWeights
from guanaco.kernels.triton import configs as triton_configs
from guanaco.kernels.triton import elementwise
from guanaco.kernels.triton import rope as rope_triton
from guanaco.kernels.triton import sampling as sampling_triton
from guanaco.kernels.triton.attention import paged as paged_attention
from guanaco.kernels.triton.ops import TritonLinear, TritonOps
from guanaco.kernels.triton.products import lora as lora_triton
from guanaco.kernels.triton.products import lora_prompt, nf4_dequant, nf4_dot, nf4_simt
from guanaco.kernels.triton.products.pack import TritonNf4

KERNEL_FILES = (
    nf4_simt, nf4_dot, nf4_dequant, lora_triton, lora_prompt, paged_attention, elementwise, rope_triton,
    sampling_triton,
)  # fmt: skip
META = torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """One variant of a kernel, and the arguments that it was first launched with."""

    function: Any  # the object that @triton.jit made
    rows: int  # tokens in the step of this launch
    arguments: Mapping[str, Any]
    signature: Mapping[str, str]  # all arguments that are not constants
    constexprs: Mapping[str, Any]
    not_divisible: frozenset[str]
    options: Mapping[str, Any]  # num_warps, num_stages, maxnreg

    @property
    def num_warps(self) -> int:
        return int(self.options["num_warps"])

    @property
    def num_stages(self) -> int:
        return int(self.options["num_stages"])

    @property
    def kernel(self) -> str:
        return str(self.function.__name__).removesuffix("_kernel")


@dataclass(eq=False)
class Recorder:
    """Records the launches while `recording` is on, each variant once. rows: tokens in the step that is being
    recorded."""

    rows: int = 0
    launches: dict[str, Launch] = field(default_factory=dict)
    _arguments: Mapping[str, Any] = field(default_factory=dict)

    def keep_arguments(self, function: Any, *args: Any, **options: Any) -> None:
        """Called by Triton before it looks for a compiled kernel."""
        self._arguments = dict(zip(function.arg_names, args, strict=False)) | options

    def refuse(self, *, key: str, fn: Any, **others: Any) -> bool:
        """Triton calls this instead of compiling; True tells it not to compile."""
        names = fn.jit_function.arg_names
        kernel = others["compile"]
        attributes = kernel["configs"][0]
        plain = {n: t for n, t in kernel["signature"].items() if t != "constexpr"}
        self.launches.setdefault(
            f"{fn.module}.{fn.name} {key}",
            Launch(
                fn.jit_function, self.rows, self._arguments, plain,
                {names[path[0]]: value for path, value in kernel["constants"].items()},
                frozenset(plain) - {names[path[0]] for path, found in attributes.items() if found},
                json.loads(kernel["specialization_data"])["options"],
            ),
        )  # fmt: skip
        return True


class _Driver:
    """The parts of Triton's driver that its binder asks for."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return self._target  # Triton keeps a binder for each device

    def get_current_stream(self, device: str) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self._target.removeprefix("sm_")), 32)


@contextmanager
def recording(target: str, num_multiprocessors: int) -> Iterator[Recorder]:
    """Record launches for `target`. Raises RuntimeError inside Triton's interpreter, which has no binder."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches can't be recorded while TRITON_INTERPRET is set: start a process without it")
    recorder = Recorder()
    functions = {v for file in KERNEL_FILES for v in vars(file).values() if isinstance(v, JITFunction)}
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(target))
    for function in functions:
        function.add_pre_run_hook(lambda *a, f=function, **k: recorder.keep_arguments(f, *a, **k))
    with triton_configs.pretending(target, num_multiprocessors), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = recorder.refuse
        try:
            yield recorder
        finally:
            config.set_active(before)
            for function in functions:
                function.pre_run_hooks.pop()


# ---- models without weights


@dataclass(frozen=True)
class ModelShape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(n, k) of q|k|v, o, gate|up and down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (q + 2 * kv, self.hidden),
            (self.hidden, q),
            (2 * self.intermediate, self.hidden),
            (
                self.hidden,
                self.intermediate,
            ),
        )


# The sizes of Guanaco (QLoRA, table 6); LLaMA-3 8B, which has groups of heads; and the demo.
MODELS = {
    "7B": ModelShape(4096, 11008, 32, 32),
    "8B": ModelShape(4096, 14336, 32, 8),
    "13B": ModelShape(5120, 13824, 40, 40),
    "33B": ModelShape(6656, 17920, 52, 52),
    "65B": ModelShape(8192, 22016, 64, 64),
    "demo": ModelShape(576, 1536, 9, 3, 64),
}
_VOCAB, _CONTEXT, _BLOCK_SIZE, _SLOTS, _PROMPT = 32000, 2048, 16, 16, 512


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _linear(n: int, k: int, code_map: Tensor, *, double_quant: bool) -> TritonLinear:
    groups = n * k // 64
    words = _empty(n, k // 8, dtype=torch.int32)
    if double_quant:
        weight = TritonNf4(words, _empty(groups, dtype=torch.uint8), _empty(-(-groups // 256), 2), code_map)
    else:
        weight = TritonNf4(words, _empty(groups), None, None)
    return TritonLinear(weight, None, k, n, weight.num_bytes)


class Steps:
    """One decoder layer of a model's shape, and the ops before and after the layers."""

    def __init__(self, recorder: Recorder, target: str, shape: ModelShape, *, double_quant: bool = True) -> None:
        self._recorder, self._shape = recorder, shape
        capability = divmod(int(target.removeprefix("sm_")), 10)
        self.dtype = torch.float16 if capability < (8, 0) else torch.bfloat16
        self.ops = TritonOps(device=META, dtype=self.dtype, capability=capability)
        self.ops.tables.reserve(7, _SLOTS)
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, inner, code_map = shape.hidden, shape.intermediate, _empty(256)
        sizes = (
            (q, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, q),
            (inner, hidden),
            (inner, hidden),
            (hidden, inner),
        )
        handles = tuple(_linear(n, k, code_map, double_quant=double_quant) for n, k in sizes)
        self._norm = _empty(hidden, dtype=torch.float16)
        layers = [LayerWeights(dict(zip(PROJECTIONS, handles, strict=True)), dict.fromkeys(NORMS, self._norm))]
        self._layers: Any = self.ops.fuse(layers, head_dim=shape.head_dim, eps=1e-6)
        self._single = handles[0]

    def step(self, rows: int, *, sequences: int = 0, adapters: int = 0, rank: int = 16) -> None:
        """Launch a step with `rows` tokens of `sequences` sequences (0: one per row) and `adapters` adapters of this
        rank."""
        self._recorder.rows = rows
        sequences, shape = sequences or rows, self._shape

        def integers(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return _empty(*sizes, dtype=dtype)

        lora = None
        if adapters:
            lora = LoraBatch(integers(0), integers(0), _empty(0), LoraTable({}), {})
            operand = self.ops.tables.over(
                integers(adapters), _empty(adapters, rows), lora_triton.rank_bucket(rank), rank % 8 == 0
            )
            self.ops.bind(lora, operand)
        table = _empty(_VOCAB, shape.hidden, dtype=torch.float16)
        x = self.ops.embedding(integers(rows, dtype=torch.int64), table)
        angles = _empty(rows, shape.head_dim // 2)
        x = self._layers(
            x, angles, angles, [self._cache(self.dtype)], integers(rows, dtype=torch.int64), self._sequences(sequences),
            lora,
        )  # fmt: skip
        self.ops.rms_norm(x, self._norm, 1e-6)

    def sampling(self) -> None:
        """Launch the sampling of one row of logits."""
        self._recorder.rows = 1
        elementwise.argmax(_empty(1, _VOCAB))
        sampling_triton.draw(_empty(1, _VOCAB), [Draw(1.0, 0, 1.0, 0.0, 0.5)])

    def unfused(self) -> None:
        """Launch the products of a model in which some projections are dense."""
        self._recorder.rows = 1
        x = _empty(1, self._shape.hidden, dtype=self.dtype)
        gate = _empty(1, self._shape.intermediate, dtype=self.dtype)
        self.ops.rms_norm(x, self._norm, 1e-6)
        self.ops.silu_mul(gate, gate)
        self.ops.linear(_empty(1, self._single.in_features, dtype=self.dtype), self._single, None, 0)

    def attention(self, cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
        """Launch a decode step of eight sequences, and a chunk of a prompt, over a cache of another dtype."""
        shape, target = self._shape, triton_configs.target_of(META)
        cache = self._cache(cache_dtype)
        for rows, sequences in ((8, 8), (_PROMPT, 1)):
            self._recorder.rows = rows
            q, k = (_empty(rows, h, shape.head_dim, dtype=dtype) for h in (shape.heads, shape.kv_heads))
            angles = _empty(rows, shape.head_dim // 2)
            rope_triton.rope_and_cache(q, k, k, angles, angles, cache, _empty(rows, dtype=torch.int64))
            paged_attention.paged_attention(
                q, cache, self._sequences(sequences), 1.0, _empty(*q.shape, dtype=dtype), max_new=rows // sequences,
                target=target, programs=4 * triton_configs.multiprocessors(META),
            )  # fmt: skip

    def _cache(self, dtype: torch.dtype) -> LayerCache:
        shape = (2 * _CONTEXT // _BLOCK_SIZE, _BLOCK_SIZE, self._shape.kv_heads, self._shape.head_dim)
        return LayerCache.made(shape, dtype, lambda sizes, kind: _empty(*sizes, dtype=kind))

    def _sequences(self, count: int) -> Sequences:
        sizes = ((count, _CONTEXT // _BLOCK_SIZE), (count,), (count + 1,))
        return Sequences(*(_empty(*size, dtype=torch.int32) for size in sizes))


def product_launches(
    target: str, num_multiprocessors: int, side: int, rows: int, adapters: int, rank: int
) -> list[Launch]:
    """The launches of one linear layer with a square matrix. The first one rounds its input to float16."""
    with recording(target, num_multiprocessors) as recorder:
        recorder.rows = rows
        ops = TritonOps(device=META, dtype=torch.float16, capability=divmod(int(target.removeprefix("sm_")), 10))
        ops.tables.reserve(1, _SLOTS)
        lora = LoraBatch(_empty(0), _empty(0), _empty(0), LoraTable({}), {}) if adapters else None
        if lora is not None:
            active = _empty(adapters, dtype=torch.int32)
            ops.bind(lora, ops.tables.over(active, _empty(adapters, rows), lora_triton.rank_bucket(rank), True))
        weight = _linear(side, side, _empty(256), double_quant=True)
        ops.linear(_empty(rows, side, dtype=torch.float16), weight, lora, 0)
    return list(recorder.launches.values())


# (rows, sequences, adapters, rank): decode steps for every tile size, prompts alone and mixed, and adapters.
_PLAIN = ((1, 0, 0, 0), (2, 0, 0, 0), (4, 0, 0, 0), (8, 0, 0, 0), (16, 0, 0, 0), (32, 0, 0, 0), (64, 0, 0, 0))
_PROMPTS = ((_PROMPT, 1, 0, 0), (_PROMPT, 8, 0, 0))
_ADAPTERS = ((1, 0, 1, 16), (1, 0, 1, 5), (4, 0, 4, 16), (8, 0, 8, 16), (64, 0, 8, 64), (_PROMPT, 8, 8, 64))
_LARGE = ((1, 0, 0, 0), (16, 0, 0, 0), (_PROMPT, 1, 0, 0))


def launches(target: str) -> list[Launch]:
    """All launches of the provider for these models on the hardest card of the target."""
    # Imported here, since nothing else in this file depends on the cards' figures.
    from guanaco.kernels.analysis.cards import hardest_card

    with recording(target, hardest_card(target).multiprocessors) as recorder:
        for name, shape in MODELS.items():
            steps = Steps(recorder, target, shape)
            wanted = (*_PLAIN, *_PROMPTS, *_ADAPTERS) if name in ("7B", "demo") else _LARGE
            for rows, sequences, adapters, rank in wanted:
                steps.step(rows, sequences=sequences, adapters=adapters, rank=rank)
            if name in ("7B", "8B", "demo"):
                steps.unfused()
                caches = [torch.int8, *([torch.float8_e4m3fn] if target in rope_triton.FP8_TARGETS else [])]
                for cache in caches:
                    steps.attention(cache, steps.dtype)
                steps.attention(torch.float32, torch.float32)
        single = Steps(recorder, target, MODELS["7B"], double_quant=False)
        for rows in (1, 4, 16, _PROMPT):
            single.step(rows, sequences=1 if rows == _PROMPT else 0)
        single.sampling()
    return list(recorder.launches.values())
