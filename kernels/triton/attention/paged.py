"""Attention over the paged KV cache in Triton: which kernel runs, with which tiles, over which grid.

Sequences with one new token go to a kernel that spreads their contexts over programs (decode.py). The other sequences
of the batch go to one with tiles of queries (prefill.py). Each kernel reads the lengths from device memory and skips
the other one's sequences, and grids depend on shapes alone, so that a CUDA graph can replay both. No atomics: the same
input gives the same bits. tests/kernels/triton/test_paged_attention.py compares with float64 in Triton's interpreter;
`guanaco bench kernels` compiles them for every target; NEVER RUN on a GPU so far. Called by the `triton` provider.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.triton.attention.decode import decode_dot, decode_reduce, decode_vector
from guanaco.kernels.triton.attention.prefill import prefill
from guanaco.kernels.triton.configs import NO_SPILLS
from guanaco.kernels.triton.rope import cache_arguments

# If values are codes times a scale, attention weights are multiplied by this before they are rounded to 16 bits. It is
# the largest code rounded up to a power of two, so weight · scale · gain is at most about the largest value.
GAINS = {torch.int8: 128.0, torch.float8_e4m3fn: 512.0}
_MIN_DIM = 16  # the least inner dimension of tl.dot
_LEAST_SPLIT_TILES = 2  # with fewer tiles per split the second stage costs more than the split gains


@dataclass(frozen=True)
class Tiles:
    """How attention is cut into tiles on one compute capability, for heads of 256 bytes; wider heads get shorter
    tiles."""

    vector_n: int  # positions per loop turn, one head
    vector_warps: int
    dot_n: int  # positions per loop turn, one group of heads
    dot_warps: int
    dot_stages: int
    prefill_m: int  # (token, head of the group) pairs
    prefill_n: int
    prefill_warps: int
    prefill_stages: int
    prefill_apart: bool = False  # see prefill.py


_AMPERE, _AMPERE_8BIT = Tiles(32, 4, 32, 2, 2, 128, 64, 8, 2), Tiles(32, 4, 64, 2, 2, 64, 32, 4, 1)
_HOPPER, _HOPPER_8BIT = Tiles(32, 4, 32, 2, 2, 128, 64, 8, 2, True), Tiles(32, 4, 32, 2, 2, 128, 64, 8, 2)
_SIMT, _FLOAT = Tiles(32, 4, 32, 4, 1, 32, 32, 8, 1), Tiles(32, 4, 32, 4, 1, 32, 16, 8, 1)
# Chosen by counts (docs/internal/log.md: registers, spills, shared memory, slots); no GPU has confirmed them. The
# tensor cores of 8.x and 12.0 want keys and values in registers, and every warp converts an 8-bit cache for itself. So
# these have fewer warps, and no pipeline, which would load 8 bytes at a time.
TILES = {
    "sm_75": _SIMT, "sm_80": _AMPERE, "sm_86": _AMPERE, "sm_89": _AMPERE, "sm_90": _HOPPER, "sm_100": _HOPPER,
    "sm_120": _AMPERE,
}  # fmt: skip
TILES_8BIT = {
    "sm_75": _SIMT, "sm_80": _AMPERE_8BIT, "sm_86": _AMPERE_8BIT, "sm_89": _AMPERE_8BIT, "sm_90": _HOPPER_8BIT,
    "sm_100": _HOPPER_8BIT, "sm_120": Tiles(32, 4, 32, 2, 2, 64, 32, 4, 1),
}  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """Compile-time constants that all kernels of a launch share."""

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
        """How many positions fill a tile with as many bytes as `positions` positions of 256 bytes."""
        return max(16, positions * 256 // max(256, self.dim * self.element_bytes))

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def prefill_rows(self, tiles: Tiles) -> int:
        """(token, head of the group) pairs in a tile; half as many if a head has more than 128 elements."""
        return max(tiles.prefill_m * 128 // max(128, self.dim), int(triton.next_power_of_2(self.group)), 16)

    def tiles(self, target: str) -> Tiles:
        """The tiles for a target. float32 never uses tensor cores: products are exact, and tiles fit the registers."""
        if self.element_bytes == 4:
            return _FLOAT
        return (TILES_8BIT if self.gain else TILES)[target]


def num_splits(sequences: int, kv_heads: int, positions: int, tile: int, programs: int) -> int:
    """Into how many parts each context is cut: the largest power of two, up to 128, that starts at most `programs`
    programs and leaves _LEAST_SPLIT_TILES tiles or more to each part of the longest context. At least 1.

    positions: the longest context for which the block tables have room, whatever they hold. tile: positions in a tile.
    """
    wanted = programs // max(1, sequences * kv_heads)
    useful = positions // (tile * _LEAST_SPLIT_TILES)
    return 1 << max(0, min(wanted, useful, 128).bit_length() - 1)


def paged_attention(
    q: Tensor,
    cache: LayerCache,
    sequences: Sequences,
    scale: float,
    out: Tensor,
    *,
    max_new: int,
    target: str = "sm_80",
    programs: int = 256,
    tiles: Tiles | None = None,
) -> None:
    """Write the attention of `Ops.paged_attention` to out [t, heads, head_dim], which has q's dtype.

    max_new: the largest number of new tokens of a sequence in this batch, or an upper bound. Every sequence has at
    least one; with exactly one its context may be empty (a graph's padding), and its result is zero. The cache has q's
    dtype or 8 bits.
    programs: how many programs fill the GPU; decides into how many parts contexts are cut. tiles: replaces the tiles
    of the target.
    """
    t, heads, head_dim = q.shape
    tables, count = sequences.block_tables, sequences.context_lens.shape[0]
    assert q.is_contiguous()
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert all(tensor.is_contiguous() for tensor in cache.tensors)
    assert tables.stride(1) == 1 or tables.numel() == 0
    gain = GAINS.get(cache.k.dtype, 0.0)
    assert gain > 0 or cache.k.dtype == q.dtype, f"{cache.k.dtype} cache for {q.dtype} queries"
    if t == 0:
        return
    shape = _Shape(heads, cache.k.shape[2], head_dim, cache.block_size, gain, q.element_size())
    operands = (q, *cache_arguments(cache), tables, sequences.context_lens, sequences.cu_seqlens_q, out)
    chosen = tiles or shape.tiles(target)
    if max_new == 1 or count > 1:
        _decode(operands, scale * math.log2(math.e), shape, chosen, programs)
    if max_new > 1:
        rows, block_n = shape.prefill_rows(chosen), shape.shorter(chosen.prefill_n)
        blocks = t // (rows // shape.group) + count
        prefill[(blocks, shape.kv_heads)](
            *operands, scale * math.log2(math.e), tables.stride(0), count,
            **shape.constexprs, BLOCK_M=rows, BLOCK_N=block_n, APART=chosen.prefill_apart,
            num_warps=chosen.prefill_warps, num_stages=chosen.prefill_stages,
        )  # fmt: skip


def _decode(operands: tuple[Tensor, ...], scale: float, shape: _Shape, tiles: Tiles, programs: int) -> None:
    """Launch one kernel, or two if contexts are split."""
    q, tables, contexts, starts, out = operands[0], operands[5], operands[6], operands[7], operands[8]
    sequences = contexts.shape[0]
    tile = shape.shorter(tiles.vector_n if shape.group == 1 else tiles.dot_n)
    splits = num_splits(sequences, shape.kv_heads, tables.shape[1] * shape.block_size, tile, programs)
    # The second stage's tensors; placeholders if there is no second stage.
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
        # For float32 ptxas spills on sm_100 without this register limit. For 16 and 8 bits the limit would not change
        # the occupancy.
        options = NO_SPILLS if q.dtype == torch.float32 else {}
        decode_vector[grid](*arguments, **constexprs, num_warps=tiles.vector_warps, num_stages=1, **options)
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
    """Rows of the tensor cores' left operand: at least 16."""
    return max(16, int(triton.next_power_of_2(group)))
