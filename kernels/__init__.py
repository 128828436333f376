"""The ops that a LLaMA is made of, and the providers that compute them.

`Ops` is the contract; `reference` (plain PyTorch) is its specification. A provider is chosen once, by name, at start.
"""

from typing import Protocol

import torch
from torch import Tensor

from guanaco.kernels.lora_batch import LoraBatch
from guanaco.kernels.nf4 import Nf4Weight

PROVIDERS = ("reference",)


class LinearHandle(Protocol):
    """A provider's own form of one linear layer's weight; opaque to everybody else."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Resident bytes, decoded copies included."""


class Ops(Protocol):
    """Everything a forward pass calls. `t` runs over all tokens of a batch, `s` over its sequences.

    Activations between ops are `dtype`; sums are float32 inside every op. Outputs never alias inputs unless said.
    """

    name: str
    device: torch.device
    dtype: torch.dtype  # float32 or bfloat16: what activations and the KV cache are stored in

    def prepare(self, weight: Nf4Weight | Tensor, bias: Tensor | None) -> LinearHandle:
        """Take over one linear layer: `Nf4Weight` or a dense [out, in] tensor. The caller drops its own reference."""

    def linear(self, x: Tensor, weight: LinearHandle, lora: LoraBatch | None, module: int) -> Tensor:
        """y[t, out] = x[t, in] · Wᵀ + bias, plus the LoRA delta of `module` for the rows that have adapters."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """[t, hidden] in `dtype` from int64 [t] and table [vocab, hidden]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[t, hidden] → [t, hidden]; the mean square in float32."""

    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Rotate q and k (halves, as Hugging Face stores LLaMA), write k and v to the cache, return the rotated q.

        q [t, heads, head_dim]; k, v [t, kv_heads, head_dim]; cos, sin float32 [t, head_dim / 2];
        caches [blocks, block_size, kv_heads, head_dim]; slot_mapping int64 [t], −1 writes nothing.
        """

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        scale: float,
    ) -> Tensor:
        """Causal attention of each sequence's new tokens over its whole context, decode and chunked prefill alike.

        q [t, heads, head_dim]; block_tables int32 [s, blocks]; context_lens int32 [s] counts this step's tokens too;
        cu_seqlens_q int32 [s + 1]. Query j of a sequence with n new tokens sees positions ≤ context_len − n + j.
        """

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) · up, [t, intermediate]."""

    def lm_head(self, x: Tensor, weight: LinearHandle) -> Tensor:
        """float32 logits [r, vocab] of the rows x [r, hidden]."""


def load_ops(name: str, *, device: torch.device, dtype: torch.dtype, decoded_weights_bytes: int) -> Ops:
    """The provider called `name`.

    decoded_weights_bytes: how much memory the reference provider may spend on weights kept decoded (0: none).
    Raises ValueError for a name that is not in PROVIDERS.
    """
    if name == "reference":
        from guanaco.kernels.reference import ReferenceOps

        return ReferenceOps(device=device, dtype=dtype, decoded_weights_bytes=decoded_weights_bytes)
    raise ValueError(f"unknown kernel provider {name!r}; this build has: {', '.join(PROVIDERS)}")
