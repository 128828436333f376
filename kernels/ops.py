"""The contract of every provider: the ops that a LLaMA is made of, with their shapes.

The `reference` provider is its specification. Knows no layers' names, requests or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraPair
from guanaco.kernels.nf4 import Nf4Weight

# Instruction sets of the `cpu` provider, the best first.
CPU_ISAS = ("avx512vnni", "avx512", "avx2", "portable")
# Projections of a layer in the order of LayerWeights: projection j of layer i is LoRA module MODULES_PER_LAYER · i + j.
MODULES_PER_LAYER = 7


class NativeUnavailable(RuntimeError):
    """A provider's own kernels cannot be used here; the message says why and what to do."""


class LinearHandle(Protocol):
    """A provider's own form of one linear layer's weight; opaque to everybody else."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes, decoded copies included."""


@dataclass(frozen=True)
class PackedWeight:
    """An NF4 weight as one provider wants it in memory; opaque to everybody else, but it may be kept on disk."""

    data: Tensor  # uint8 [bytes]
    shape: tuple[int, int]  # of the weight, [out, in]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: x + o(attention(q, k, v of norm(x))), then x + down(SiLU(gate) · up of norm(x))."""

    input_norm: Tensor  # [hidden]
    projections: tuple[LinearHandle, ...]  # q, k, v, o, gate, up, down
    post_norm: Tensor  # [hidden]


class FusedLayers(Protocol):
    """All decoder layers of one model as one op."""

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[LayerCache],
        slot_mapping: Tensor,
        sequences: Sequences,
        lora: LoraBatch | None,
    ) -> Tensor:
        """[t, hidden] → [t, hidden], `dtype` or float32; caches: one per layer, written and read.
        Shapes as in `Ops`."""


@dataclass(frozen=True)
class Draw:
    """How one token is picked from its logits. temperature 0: the largest; top_k 0, top_p 1, min_p 0 filter nothing.

    Temperature, top_p and min_p count as float32 holds them: 7e-46 and less is 0 there. The likeliest token passes
    every filter, at a top_p of 0 as well.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float  # in [0, 1): the noise


class Ops(Protocol):
    """Everything a forward pass calls. `t` runs over all tokens of a batch, `s` over its sequences.

    Activations between ops are `dtype`; sums are float32 inside every op. Outputs never alias inputs unless said.
    """

    name: str
    device: torch.device
    dtype: torch.dtype  # float32, bfloat16 or (triton) float16: what activations and the KV cache are stored in
    cache_dtypes: tuple[torch.dtype, ...]  # 8-bit ones (`layer_cache.CODE_LIMITS`) that a cache may have instead
    packed_format: str  # names the form that `pack` gives weights; empty: there is none worth keeping

    def pack(self, weight: Nf4Weight) -> PackedWeight | Nf4Weight:
        """The weight in the provider's own form, for `prepare` now or later; as it is where that form has none."""

    def prepare(self, weight: Nf4Weight | PackedWeight | Tensor, bias: Tensor | None) -> LinearHandle:
        """Take over one linear layer: NF4, packed by an Ops of the same `packed_format`, or a dense [out, in] tensor.
        The caller drops its own reference."""

    def place_adapter(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        """The matrices of one adapter where and as this provider reads them best; called once, when it is loaded."""

    def linear(self, x: Tensor, weight: LinearHandle, lora: LoraBatch | None, module: int) -> Tensor:
        """y[t, out] = x[t, in] · Wᵀ + bias, plus the LoRA delta of `module` for the rows that have adapters."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """[t, hidden] in `dtype` from int64 [t] and table [vocab, hidden]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[t, hidden] → [t, hidden]; the mean square in float32."""

    def rope_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slot_mapping: Tensor
    ) -> Tensor:
        """Rotate q and k (halves, as Hugging Face stores LLaMA), write k and v to the cache, return the rotated q.

        q [t, heads, head_dim]; k, v [t, kv_heads, head_dim]; cos, sin float32 [t, head_dim / 2];
        slot_mapping int64 [t]: KV slot = block · block_size + offset, −1 writes nothing.
        """

    def paged_attention(self, q: Tensor, cache: LayerCache, sequences: Sequences, scale: float) -> Tensor:
        """Causal attention of each sequence's new tokens over its whole context, decode and chunked prefill alike.

        q [t, heads, head_dim]. Query j of a sequence with n new tokens sees positions ≤ context_len − n + j.
        """

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) · up, [t, intermediate]."""

    def lm_head(self, x: Tensor, weight: LinearHandle) -> Tensor:
        """float32 logits [r, vocab] of the rows x [r, hidden]."""

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int] | None:
        """One token per row of float32 logits [r, vocab], which may be -infinity in places; of equal ones the lowest.

        Filters keep the likeliest: top_k of them, those before which less than top_p lies, those of at least min_p
        times the largest. None: this provider leaves it to the caller.
        """

    def fuse(self, layers: Sequence[LayerWeights], *, head_dim: int, eps: float) -> FusedLayers | None:
        """All layers as one op, for a provider to which the calls between them are dear; None: call them singly."""
