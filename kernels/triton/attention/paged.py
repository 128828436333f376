"""Attention over the paged KV cache in Triton: which kernel runs, with which tiles, over which grid.

Sequences with one new token go to a kernel that splits their contexts over programs (paged_decode.py), the others of
the same batch to one with tiles of queries (paged_prefill.py); each leaves out the other's by lengths that it reads
from device memory, and grids follow from shapes alone, so that a CUDA graph can replay them. No atomics: the same
input gives the same bits. Held to float64 by tests/kernels/triton/test_paged_attention.py in Triton's interpreter,
compiled for every target by `guanaco bench kernels`; NEVER RUN on a GPU so far. Called by the `triton` provider.
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
    prefill_apart: bool = False  # see paged_prefill.py


_AMPERE, _AMPERE_8BIT = Tiles(32, 4, 32, 2, 2, 128, 64, 8, 2), Tiles(32, 4, 64, 2, 2, 64, 32, 4, 1)
_HOPPER, _HOPPER_8BIT = Tiles(32, 4, 32, 2, 2, 128, 64, 8, 2, True), Tiles(32, 4, 32, 2, 2, 128, 64, 8, 2)
_SIMT, _FLOAT = Tiles(32, 4, 32, 4, 1, 32, 32, 8, 1), Tiles(32, 4, 32, 4, 1, 32, 16, 8, 1)
# Chosen by counts (docs/internal/log.md: registers, spills, shared memory, slots); no card has confirmed them. The
# tensor cores
# of 8.x and 12.0 want keys and values in registers, which every warp converts for itself from an 8-bit cache: fewer
# warps there, and no pipeline, which would load 8 bytes at a time.
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
        """(token, head of the group) pairs of a tile; half as many where heads are twice as wide as 128."""
        return max(tiles.prefill_m * 128 // max(128, self.dim), int(triton.next_power_of_2(self.group)), 16)

    def tiles(self, target: str) -> Tiles:
        """float32 runs without tensor cores everywhere: exact products, tiles that its registers have room for."""
        if self.element_bytes == 4:
            return _FLOAT
        return (TILES_8BIT if self.gain else TILES)[target]


def num_splits(sequences: int, kv_heads: int, positions: int, tile: int, programs: int) -> int:
    """Parts that each context is cut into, a power of two: enough for `programs` of them, none without work.

    positions: the longest context that the block tables have room for, whatever is in them.
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

    max_new: the most new tokens that a sequence of this batch has, or an upper bound; every sequence has at least one,
    but its context may be empty if it has just one (the padding of a graph: zeros). The cache has q's dtype or 8 bits.
    programs: how many fill the card, which decides how far contexts are split. tiles: others than the target's.
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
        # Without the limit ptxas spills here for sm_100; 16 and 8 bits keep the occupancy that they have without it.
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
    """Rows of the tensor cores' left operand: at least sixteen."""
    return max(16, int(triton.next_power_of_2(group)))
