"""The operands of attention: one layer's paged keys and values, and which of them belong to the sequences of a batch.

Keys and values may be kept in 8 bits; what their codes mean is defined here, in plain PyTorch. Knows no blocks' owners.
Made by the model's cache and the model runner, read and written by the ops.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The 8-bit forms of a cache, and the largest code of each.
CODE_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class LayerCache:
    """K and V of one layer, [blocks, block_size, kv_heads, head_dim] each: in the activations' dtype, or in 8 bits.

    8-bit codes are multiples of one float32 scale for each token and head. The scales, [blocks, kv_heads, block_size],
    lie so that those of one head and consecutive positions are read together.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.k.shape, self.k.dtype) == (self.v.shape, self.v.dtype), (self.k.shape, self.v.shape)
        blocks, block_size, kv_heads, _ = self.k.shape
        for scales in (self.k_scales, self.v_scales):
            assert (scales is not None) == (self.k.dtype in CODE_LIMITS), "8-bit codes have scales, nothing else has"
            assert scales is None or scales.shape == (blocks, kv_heads, block_size), scales.shape

    @staticmethod
    def made(
        shape: tuple[int, int, int, int], dtype: torch.dtype, make: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> "LayerCache":
        """A cache of this shape whose tensors `make` makes."""
        k, v = make(shape, dtype), make(shape, dtype)
        if dtype not in CODE_LIMITS:
            return LayerCache(k, v)
        blocks, block_size, kv_heads, _ = shape
        scales = (blocks, kv_heads, block_size)
        return LayerCache(k, v, make(scales, torch.float32), make(scales, torch.float32))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are."""
        return tuple(t for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)

    @property
    def block_size(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True)
class Sequences:
    """The sequences `s` of a batch: how many of its tokens are whose, and where their keys and values lie."""

    block_tables: Tensor  # int32 [s, blocks]  padded with anything; context_lens says where to stop
    context_lens: Tensor  # int32 [s]       tokens attended to, this step's included
    cu_seqlens_q: Tensor  # int32 [s + 1]   rows of the batch at which each begins, and their number


def quantise_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [t, heads, head_dim] of an 8-bit `dtype`, and their scales, float32 [t, heads]: the head's largest element
    gets the largest code. x: float32 [t, heads, head_dim]."""
    limit = CODE_LIMITS[dtype]
    largest = x.abs().amax(-1)
    codes = x * torch.where(largest > 0, limit / largest, 0.0).unsqueeze(-1)
    if dtype == torch.int8:  # to the nearest; the conversion would cut
        codes = (codes + 0.5).floor()
    return codes.to(dtype), largest / limit


def decoded(stored: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [blocks, block_size, kv_heads, head_dim] of a cache's K or V, or of some blocks of it."""
    return stored.float() if scales is None else stored.float() * scales.transpose(1, 2).unsqueeze(-1)
