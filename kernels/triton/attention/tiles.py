"""What the Triton attention kernels share: finding positions in the paged cache, loading tiles, attending to a tile.

A tile is BLOCK_N consecutive positions of one key-value head. DIM is the head's dimension rounded up to a power of two;
elements beyond HEAD_DIM are never read and count as zero. Positions that no token has written may hold NaN: they are
masked when they are loaded, because a weight of zero would not hide them.
"""

import triton
import triton.language as tl


@triton.jit
def load_positions(table, position, inside, BLOCK_SIZE: tl.constexpr):
    """(block, offset in it) of positions [BLOCK_N], both int64; block 0 for positions that are not `inside`."""
    block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return block, (position % BLOCK_SIZE).to(tl.int64)


@triton.jit
def load_tile(
    cache, block, offset, head, d, inside,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, DIM] as stored; zeros for positions not `inside`. WHOLE: all positions are inside."""
    row = cache + (block * BLOCK_SIZE + offset) * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM
    at = row[:, None] + d[None, :]
    if DIM == HEAD_DIM:
        if WHOLE:
            return tl.load(at)
        return tl.load(at, mask=inside[:, None], other=0.0)
    if WHOLE:
        return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_scales(scales, block, offset, head, inside, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """float32 [BLOCK_N]: the scales of these positions in a quantised cache."""
    return tl.load(scales + (block * KV_HEADS + head) * BLOCK_SIZE + offset, mask=inside, other=0.0)


@triton.jit
def load_heads(at, d, inside, HEAD_DIM: tl.constexpr):
    """Queries [BLOCK_M, DIM] at pointers [BLOCK_M] to their first elements."""
    return tl.load(at[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def attend_tile(
    acc, maximum, total, query, seen, position, inside, table, k_cache, v_cache, k_scales, v_scales, head, d, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GAIN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attend to one tile: a step of softmax(query · keys) · values on tensor cores; returns the new (acc, maximum,
    total).

    query [BLOCK_M, DIM]; row i sees the positions before seen[i]; scale includes log2(e). GAIN > 0: the cache is
    quantised. Its scales are then applied to scores and weights, not to keys and values. Weights are also multiplied by
    GAIN, so that a small scale doesn't push them below float16's normal numbers; in the end acc is GAIN times too
    large.
    """
    block, offset = load_positions(table, position, inside, BLOCK_SIZE)
    keys = load_tile(k_cache, block, offset, head, d, inside, KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, WHOLE)
    scores = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee") * scale
    if GAIN > 0.0:
        scores *= load_scales(k_scales, block, offset, head, inside, KV_HEADS, BLOCK_SIZE)[None, :]
    if not WHOLE:
        scores = tl.where(position[None, :] < seen[:, None], scores, float("-inf"))
    above = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - above[:, None])
    shrink = tl.exp2(maximum - above)
    total = total * shrink + tl.sum(weights, 1)
    values = load_tile(v_cache, block, offset, head, d, inside, KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, WHOLE)
    if GAIN > 0.0:
        weights *= load_scales(v_scales, block, offset, head, inside, KV_HEADS, BLOCK_SIZE)[None, :] * GAIN
    acc = tl.dot(weights.to(query.dtype), values.to(query.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, above, total
