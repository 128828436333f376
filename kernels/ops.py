"""The contract of every provider: the ops that a decoder is made of, with their shapes.

The `reference` provider is its specification. Knows no requests, files or names of architectures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraPair
from guanaco.kernels.nf4 import Nf4Weight

# Instruction sets of the `cpu` provider, the best first.
CPU_ISAS = ("avx512vnni", "avx512", "avx2", "portable")
# The parts of the layer that providers fuse, see `LayerWeights`. The projections are in the order of LoRA modules.
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "post_attention")
HEAD_NORMS = ("q", "k")


class NativeUnavailable(RuntimeError):
    """A provider's own kernels cannot be used here; the message says why and what to do."""


class NoGpu(NativeUnavailable):
    """The kernels are for a GPU, and torch finds none."""


class LinearHandle(Protocol):
    """A provider's own form of one linear layer's weight; other code only passes it on."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, decoded copies included."""


@dataclass(frozen=True)
class PackedWeight:
    """An NF4 weight in a provider's own memory layout. Other code only passes it on, or keeps its bytes on disk."""

    data: Tensor  # uint8 [bytes]
    shape: tuple[int, int]  # of the weight, [out, in]


class DecodesRows(Protocol):
    """A provider that can give a weight's numbers, as training needs them: `reference` and `cpu`."""

    def decode_rows(self, weight: LinearHandle, start: int, stop: int, out: Tensor) -> None:
        """Write rows start … stop − 1 of the weight, as they are served, into `out` [stop − start, in], float32 or
        bfloat16.

        `out` must be contiguous. An NF4 weight is level × scale in float32, rounded once more for bfloat16.
        """


@dataclass(frozen=True)
class LayerWeights:
    """The parts of one decoder layer by name. A name says what is computed:

    x + o(attention(q, k, v of input(x))), then x + down(SiLU(gate) · up of post_attention(x)). Each projection's handle
    has its bias, if there is one. Norms "q" and "k", where they are given, normalise each head before the rotation.
    A provider doesn't fuse layers that have a part it doesn't know, or lack one that it needs.
    """

    projections: Mapping[str, LinearHandle]  # number j of layer i is LoRA module len(projections) · i + j
    norms: Mapping[str, Tensor]  # [hidden], those of heads [head_dim]

    def has(self, projections: Sequence[str], norms: Sequence[str]) -> bool:
        """Whether the layer has these parts and no others, the projections in this order."""
        return tuple(self.projections) == tuple(projections) and self.norms.keys() == set(norms)


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
        """x [t, hidden] → [t, hidden]; each is in `dtype` or float32. Layer i reads and writes caches[i].

        The other arguments have the shapes that `Ops` gives.
        """


@dataclass(frozen=True)
class Draw:
    """How one token is picked from its logits. temperature 0 picks the largest; top_k 0, top_p 1 and min_p 0 filter
    nothing.

    Temperature, top_p and min_p are rounded to float32, so a value of 7e-46 or less counts as 0. The likeliest token
    passes every filter, even a top_p of 0.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float  # in [0, 1): the random number that decides


class Ops(Protocol):
    """Everything a forward pass calls. `t` runs over all tokens of a batch, `s` over its sequences.

    Activations between ops are `dtype`; sums are float32 inside every op. Outputs never alias inputs unless said.
    """

    name: str
    device: torch.device
    dtype: torch.dtype  # float32, bfloat16 or (triton) float16: what activations and the KV cache are stored in
    # 8-bit dtypes (`layer_cache.CODE_LIMITS`) that a KV cache may have instead of `dtype`
    cache_dtypes: tuple[torch.dtype, ...]
    # names the form that `pack` gives weights; empty if `pack` changes nothing worth keeping on disk
    packed_format: str

    def pack(self, weight: Nf4Weight) -> PackedWeight | Nf4Weight:
        """The weight in the provider's own form, for `prepare` now or later; the weight itself if that form can't hold
        it."""

    def prepare(self, weight: Nf4Weight | PackedWeight | Tensor, bias: Tensor | None) -> LinearHandle:
        """Prepare one linear layer: an NF4 weight, one packed by an Ops of the same `packed_format`, or a dense [out,
        in] tensor.

        The provider keeps what it needs: the caller should drop its own reference, which would hold memory.
        """

    def place_adapter(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        """One adapter's matrices, on the device and in the layout that this provider reads best. Called once per
        load."""

    def linear(self, x: Tensor, weight: LinearHandle, lora: LoraBatch | None, module: int) -> Tensor:
        """y[t, out] = x[t, in] · Wᵀ + bias, plus the LoRA delta of `module` for the rows that have adapters."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """[t, hidden] in `dtype` from int64 [t] and table [vocab, hidden]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[t, hidden] → [t, hidden]; the mean square in float32. Also for heads, a row each: [t · heads, head_dim]."""

    def rope_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slot_mapping: Tensor
    ) -> Tensor:
        """Rotate the pairs (i, i + head_dim / 2) of q and k, write k and v to the cache, and return the rotated q.

        q [t, heads, head_dim]; k, v [t, kv_heads, head_dim]; cos, sin float32 [t, head_dim / 2];
        slot_mapping int64 [t]: KV slot = block · block_size + offset, −1 writes nothing.
        """

    def paged_attention(self, q: Tensor, cache: LayerCache, sequences: Sequences, scale: float) -> Tensor:
        """Causal attention of each sequence's new tokens over its whole context, for decoding and for chunks of
        prompts.

        q [t, heads, head_dim]. Query j of a sequence with n new tokens sees positions ≤ context_len − n + j.
        """

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) · up, [t, intermediate]."""

    def lm_head(self, x: Tensor, weight: LinearHandle) -> Tensor:
        """float32 logits [r, vocab] of the rows x [r, hidden]."""

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int] | None:
        """One token per row of float32 logits [r, vocab]. A logit of -infinity forbids its token.

        At temperature 0 the largest logit wins, of equal ones that with the lowest id. Filters keep the likeliest
        tokens, equal ones ordered by id: the first top_k; those with less than top_p of the probability before them;
        those with at least min_p times the largest probability. Returns None if this provider leaves sampling to the
        caller.
        """

    def fuse(self, layers: Sequence[LayerWeights], *, head_dim: int, eps: float) -> FusedLayers | None:
        """All layers as one op. None if that is no faster, or if the provider doesn't know a part of these layers (see
        `LayerWeights`): then the caller calls the ops one by one."""
