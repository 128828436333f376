"""The operands of attention: one layer's paged keys and values, and the part of them that each sequence of a batch
uses.

Keys and values may be stored in 8 bits; this file defines the codes, in plain PyTorch. It doesn't know which request
owns a block. The model's cache and the model runner build these objects; the ops read and write them.
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

    An 8-bit code stands for code × scale; each token and head has one float32 scale. The order of the scales, [blocks,
    kv_heads, block_size], makes those of one head and consecutive positions neighbours in memory.
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
        """A cache of `shape` [blocks, block_size, kv_heads, head_dim]; `make(shape, dtype)` allocates each tensor."""
        k, v = make(shape, dtype), make(shape, dtype)
        if dtype not in CODE_LIMITS:
            return LayerCache(k, v)
        blocks, block_size, kv_heads, _ = shape
        scales = (blocks, kv_heads, block_size)
        return LayerCache(k, v, make(scales, torch.float32), make(scales, torch.float32))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of this cache: K and V, and their scales if the cache is in 8 bits."""
        return tuple(t for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)

    @property
    def block_size(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True)
class Sequences:
    """The sequences `s` of a batch: which tokens of the batch belong to each, and which cache blocks hold its keys and
    values."""

    block_tables: Tensor  # int32 [s, blocks]; entries beyond a sequence's context may hold anything
    context_lens: Tensor  # int32 [s]: tokens attended to, this step's included
    # int32 [s + 1]: the first row of each sequence in the batch; the last entry is the number of rows
    cu_seqlens_q: Tensor


def quantise_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes [t, heads, head_dim] of an 8-bit `dtype`, their scales float32 [t, heads]).

    x: float32 [t, heads, head_dim]. The scale maps the largest element of a head to the largest code.
    """
    limit = CODE_LIMITS[dtype]
    largest = x.abs().amax(-1)
    codes = x * torch.where(largest > 0, limit / largest, 0.0).unsqueeze(-1)
    if dtype == torch.int8:  # round to the nearest code; the conversion alone would truncate
        codes = (codes + 0.5).floor()
    return codes.to(dtype), largest / limit


def decoded(stored: Tensor, scales: Tensor | None) -> Tensor:
    """K or V of a cache, or some blocks of it, as float32 [blocks, block_size, kv_heads, head_dim]."""
    return stored.float() if scales is None else stored.float() * scales.transpose(1, 2).unsqueeze(-1)
