"""Attention over the paged KV cache in Triton: which kernel runs, with which tiles, over which grid.

Sequences with one new token go to a kernel that splits their contexts over programs (paged_decode.py), the others of
the same batch to one with tiles of queries (paged_prefill.py); each leaves out the other's by lengths that it reads
from device memory, and grids follow from shapes alone, so that a CUDA graph can replay them. No atomics: the same
input gives the same bits. Held to float64 by tests/kernels/test_paged_attention.py in Triton's interpreter, compiled
for every target by `guanaco bench kernels`; NEVER RUN on a GPU so far. Called by the `triton` provider.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from guanaco.kernels.paged_decode import decode_dot, decode_reduce, decode_vector
from guanaco.kernels.paged_prefill import prefill

# Weights are raised by this much before they are rounded to 16 bits where values are multiples of a scale: the code's
# range, so that weight · scale · gain is at most the largest value itself.
GAINS = {torch.int8: 128.0, torch.float8_e4m3fn: 512.0}
_MIN_DIM = 16  # the least inner dimension of tl.dot
_LEAST_SPLIT_TILES = 2  # splits of fewer tiles cost more in the second stage than they gain


@dataclass(frozen=True)
class Tiles:
    """How attention is cut for one compute capability, for heads of 256 bytes; wider ones get shorter tiles."""

    vector_n: int  # positions of a turn, one head
    vector_warps: int
    dot_n: int  # positions of a turn, one group of heads
    dot_warps: int
    dot_stages: int
    prefill_m: int  # (token, head of the group) pairs
    prefill_n: int
    prefill_warps: int
    prefill_stages: int


_SMALL = Tiles(32, 4, 32, 2, 2, 64, 32, 4, 2)
# Chosen by the counts in docs/log.md (registers, spills, shared memory, slots); no card has confirmed them.
TILES = {
    "sm_75": Tiles(32, 4, 32, 4, 1, 16, 32, 4, 1),
    "sm_80": Tiles(32, 4, 32, 2, 3, 128, 64, 8, 2),
    "sm_86": _SMALL,
    "sm_89": _SMALL,
    "sm_90": Tiles(32, 4, 32, 2, 3, 128, 64, 8, 2),
    "sm_100": Tiles(32, 4, 32, 2, 3, 128, 64, 8, 2),
    "sm_120": _SMALL,
}


@dataclass(frozen=True)
class _Shape:
    """What all kernels of a launch know at compile time."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    gain: float
    element_bytes: int  # of q

    @property
    def dim(self) -> int:
        return max(_MIN_DIM, int(triton.next_power_of_2(self.head_dim)))

    @property
    def constexprs(self) -> dict[str, Any]:
        return {
            "HEADS": self.heads, "KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim, "DIM": self.dim,
            "BLOCK_SIZE": self.block_size, "GAIN": self.gain,
        }  # fmt: skip

    def shorter(self, positions: int) -> int:
        """Positions of a tile that has as many bytes as `positions` of 256 bytes."""
        return max(16, positions * 256 // max(256, self.dim * self.element_bytes))

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def prefill_rows(self, tiles: Tiles) -> int:
        return max(tiles.prefill_m, int(triton.next_power_of_2(self.group)))


def num_splits(sequences: int, kv_heads: int, positions: int, tile: int, programs: int) -> int:
    """Parts that each context is cut into, a power of two: enough for `programs` of them, none without work.

    positions: the longest context that the block tables have room for, whatever is in them.
    """
    wanted = programs // max(1, sequences * kv_heads)
    useful = positions // (tile * _LEAST_SPLIT_TILES)
    return 1 << max(0, min(wanted, useful, 128).bit_length() - 1)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    out: Tensor,
    *,
    max_new: int,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    target: str = "sm_80",
    programs: int = 256,
    tiles: Tiles | None = None,
) -> None:
    """Write the attention of `Ops.paged_attention` to out [t, heads, head_dim], which has q's dtype.

    max_new: the most new tokens that a sequence of this batch has, or an upper bound; every sequence has at least one,
    but its context may be empty if it has just one (the padding of a graph: zeros). k_scales and v_scales, float32
    [blocks, kv_heads, block_size], belong to an int8 or float8_e4m3fn cache; any other has q's dtype.
    programs: how many fill the card, which decides how far contexts are split. tiles: others than the target's.
    """
    t, heads, head_dim = q.shape
    sequences = context_lens.shape[0]
    assert q.is_contiguous()
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    assert k_cache.shape == v_cache.shape
    assert block_tables.stride(1) == 1 or block_tables.numel() == 0
    gain = GAINS.get(k_cache.dtype, 0.0)
    assert gain > 0 or k_cache.dtype == q.dtype, f"{k_cache.dtype} cache for {q.dtype} queries"
    assert (gain > 0) == (k_scales is not None) == (v_scales is not None), "a quantised cache has scales, no other"
    if t == 0:
        return
    shape = _Shape(heads, k_cache.shape[2], head_dim, k_cache.shape[1], gain, q.element_size())
    scales = (k_cache if k_scales is None else k_scales, v_cache if v_scales is None else v_scales)
    operands = (q, k_cache, v_cache, *scales, block_tables, context_lens, cu_seqlens_q, out)
    chosen = tiles or TILES[target]
    if max_new == 1 or sequences > 1:
        _decode(operands, scale * math.log2(math.e), shape, chosen, programs)
    if max_new > 1:
        rows, block_n = shape.prefill_rows(chosen), shape.shorter(chosen.prefill_n)
        blocks = t // (rows // shape.group) + sequences
        prefill[(blocks, shape.kv_heads)](
            *operands, scale * math.log2(math.e), block_tables.stride(0), sequences,
            **shape.constexprs, BLOCK_M=rows, BLOCK_N=block_n,
            num_warps=chosen.prefill_warps, num_stages=chosen.prefill_stages,
        )  # fmt: skip


def _decode(operands: tuple[Tensor, ...], scale: float, shape: _Shape, tiles: Tiles, programs: int) -> None:
    """One kernel, or two where contexts are split."""
    q, tables, contexts, starts, out = operands[0], operands[5], operands[6], operands[7], operands[8]
    sequences = contexts.shape[0]
    tile = shape.shorter(tiles.vector_n if shape.group == 1 else tiles.dot_n)
    splits = num_splits(sequences, shape.kv_heads, tables.shape[1] * shape.block_size, tile, programs)
    # Of the second stage; stand-ins where there is none.
    partial = maxima = sums = out
    if splits > 1:
        parts = (sequences, shape.heads, splits)
        partial = torch.empty((*parts, shape.head_dim), dtype=torch.float32, device=q.device)
        maxima, sums = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    grid = (sequences, shape.kv_heads, splits)
    arguments = (*operands, partial, maxima, sums, scale, tables.stride(0))
    constexprs = {**shape.constexprs, "BLOCK_N": tile, "SPLITS": splits}
    if shape.group == 1:
        constexprs.pop("KV_HEADS")
        decode_vector[grid](*arguments, **constexprs, num_warps=tiles.vector_warps, num_stages=1)
    else:
        decode_dot[grid](
            *arguments, **constexprs, BLOCK_M=_rows_of(shape.group),
            num_warps=tiles.dot_warps, num_stages=tiles.dot_stages,
        )  # fmt: skip
    if splits > 1:
        decode_reduce[(sequences, shape.heads)](
            partial, maxima, sums, contexts, starts, out,
            HEADS=shape.heads, HEAD_DIM=shape.head_dim, DIM=shape.dim, BLOCK_N=tile, SPLITS=splits, num_warps=1,
        )  # fmt: skip


def _rows_of(group: int) -> int:
    """Rows of the tensor cores' left operand: at least sixteen."""
    return max(16, int(triton.next_power_of_2(group)))
