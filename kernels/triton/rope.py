"""Rotary embedding and the write to the paged KV cache in one Triton kernel; the cache may be kept in 8 bits.

`layer_cache.quantise_heads` defines the 8-bit codes. tests/kernels/triton/test_rope.py compares with float64 in
Triton's interpreter; NEVER RUN on a GPU so far. Called by the provider.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache

# Conversions to e4m3 exist from compute capability 8.9 on.
FP8_TARGETS = ("sm_89", "sm_90", "sm_100", "sm_120")


@triton.jit
def _quantise(low, high, LIMIT: tl.constexpr):
    """The two halves of heads [h, d / 2] as 8-bit codes, and one scale for each head: its largest element gets code
    ±LIMIT."""
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    inverse = tl.where(largest > 0.0, LIMIT / largest, 0.0)[:, None]
    low, high = low * inverse, high * inverse
    if LIMIT == 127.0:  # int8: round to the nearest code; the conversion alone would truncate
        low, high = tl.floor(low + 0.5), tl.floor(high + 0.5)
    return low, high, largest / LIMIT


@triton.jit
def _write_heads(
    cache, scales, slot, head, pair, inside, low, high,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    if LIMIT > 0.0:
        low, high, scale = _quantise(low, high, LIMIT)
        first = scales + (slot // BLOCK_SIZE) * HEADS * BLOCK_SIZE + slot % BLOCK_SIZE
        tl.store(first + head * BLOCK_SIZE, scale, mask=head < HEADS)
    at = cache + slot * HEADS * HEAD_DIM + head[:, None] * HEAD_DIM + pair[None, :]
    tl.store(at, low.to(cache.dtype.element_ty), mask=inside)
    tl.store(at + HEAD_DIM // 2, high.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def rope_and_cache_kernel(
    q, k, v, cos, sin, k_cache, v_cache, k_scales, v_scales, slots, rotated, q_stride, k_stride, v_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_HEADS heads of one token. Programs take the queries' heads first, then the keys' heads with the values'."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    QUERY_PARTS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, PAIRS)
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if part < QUERY_PARTS:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < HEADS)[:, None] & (pair < HALF)[None, :]
        offset = head[:, None] * HEAD_DIM + pair[None, :]
        low = tl.load(q + token * q_stride + offset, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(q + token * q_stride + offset + HALF, mask=inside, other=0.0).to(tl.float32)
        at = rotated + token * HEADS * HEAD_DIM + offset
        tl.store(at, (low * c - high * s).to(rotated.dtype.element_ty), mask=inside)
        tl.store(at + HALF, (high * c + low * s).to(rotated.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = (part - QUERY_PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            inside = (head < KV_HEADS)[:, None] & (pair < HALF)[None, :]
            offset = head[:, None] * HEAD_DIM + pair[None, :]
            low = tl.load(k + token * k_stride + offset, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(k + token * k_stride + offset + HALF, mask=inside, other=0.0).to(tl.float32)
            turned_low, turned_high = low * c - high * s, high * c + low * s
            _write_heads(k_cache, k_scales, slot, head, pair, inside, turned_low, turned_high,
                         KV_HEADS, HEAD_DIM, BLOCK_SIZE, LIMIT)  # fmt: skip
            low = tl.load(v + token * v_stride + offset, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(v + token * v_stride + offset + HALF, mask=inside, other=0.0).to(tl.float32)
            _write_heads(v_cache, v_scales, slot, head, pair, inside, low, high,
                         KV_HEADS, HEAD_DIM, BLOCK_SIZE, LIMIT)  # fmt: skip


def rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slot_mapping: Tensor
) -> Tensor:
    """See `Ops.rope_and_cache`; q, k and v may be slices of one merged tensor (any stride between tokens)."""
    t, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    assert head_dim % 2 == 0
    assert all(x.stride()[1:] == (head_dim, 1) or x.numel() == 0 for x in (q, k, v)), "heads must be dense"
    assert all(tensor.is_contiguous() for tensor in cache.tensors)
    assert cache.k.shape[2:] == (kv_heads, head_dim)
    rotated = torch.empty((t, heads, head_dim), dtype=q.dtype, device=q.device)
    pairs = triton.next_power_of_2(head_dim // 2)
    block_heads = _block_heads(pairs, heads)
    if t:
        rope_and_cache_kernel[(t, triton.cdiv(heads, block_heads) + triton.cdiv(kv_heads, block_heads))](
            q, k, v, cos, sin, *cache_arguments(cache), slot_mapping, rotated, q.stride(0), k.stride(0), v.stride(0),
            HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, PAIRS=pairs, BLOCK_HEADS=block_heads,
            BLOCK_SIZE=cache.block_size, LIMIT=CODE_LIMITS.get(cache.k.dtype, 0.0), num_warps=1,
        )  # fmt: skip
    return rotated


def cache_arguments(cache: LayerCache) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A kernel's k_cache, v_cache, k_scales, v_scales. If the cache has no scales, others stand in and aren't read."""
    k_scales, v_scales = (cache.k if scales is None else scales for scales in (cache.k_scales, cache.v_scales))
    return cache.k, cache.v, k_scales, v_scales


def _block_heads(pairs: int, heads: int) -> int:
    """Heads per program: each lane of a warp gets 8 pairs, which are 16 bytes of 16-bit numbers."""
    return int(min(max(1, 256 // pairs), triton.next_power_of_2(heads)))
