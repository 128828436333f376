"""Triton kernels for sequences with one new token: each program attends to a part ("split") of a context, and a second
kernel adds the splits.

The context of a sequence is cut into SPLITS parts of whole tiles. Their length is computed from the context's length in
device memory, so a CUDA graph serves any lengths. `decode_dot` uses tensor cores, with the query heads that share a
key-value head as rows. If each query head has a key-value head of its own, the rows would be single ones, and
`decode_vector` runs instead. Launched by paged.py. Sequences with more than one new token are left to prefill.py.
"""

import triton
import triton.language as tl

from guanaco.kernels.triton.attention.tiles import attend_tile, load_heads, load_positions, load_scales, load_tile

# Below every score. It starts the running maximum and is finite, so that no difference is NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def split_length(context, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of one split: whole tiles, at least one. All splits have this length except the last that isn't
    empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(context, BLOCK_N), SPLITS), 1) * BLOCK_N


@triton.jit(do_not_specialize=["table_stride"])
def decode_vector(
    q, k_cache, v_cache, k_scales, v_scales, tables, contexts, starts, out, partial, maxima, sums, scale, table_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """One head, one split.

    Each of the BLOCK_N rows runs its own softmax over every BLOCK_N-th position, in registers. The rows are merged at
    the end, so that warps exchange nothing inside the loop.
    """
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    length = split_length(context, SPLITS, BLOCK_N)
    first = split * length
    if (first >= context) & (split > 0):
        return
    last = tl.minimum(first + length, context)
    d, n = tl.arange(0, DIM), tl.arange(0, BLOCK_N)
    query = tl.load(q + (row * HEADS + head) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32) * scale
    table = tables + sequence * table_stride
    maximum = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    for start in range(first, last, BLOCK_N):
        position = start + n
        inside = position < last
        block, offset = load_positions(table, position, inside, BLOCK_SIZE)
        keys = load_tile(k_cache, block, offset, head, d, inside, HEADS, HEAD_DIM, DIM, BLOCK_SIZE, False)
        values = load_tile(v_cache, block, offset, head, d, inside, HEADS, HEAD_DIM, DIM, BLOCK_SIZE, False)
        scores = tl.sum(keys.to(tl.float32) * query[None, :], 1)
        if GAIN > 0.0:
            scores *= load_scales(k_scales, block, offset, head, inside, HEADS, BLOCK_SIZE)
        scores = tl.where(inside, scores, float("-inf"))
        above = tl.maximum(maximum, scores)
        weights, shrink = tl.exp2(scores - above), tl.exp2(maximum - above)
        total = total * shrink + weights
        if GAIN > 0.0:
            weights *= load_scales(v_scales, block, offset, head, inside, HEADS, BLOCK_SIZE)
        acc = acc * shrink[:, None] + weights[:, None] * values.to(tl.float32)
        maximum = above
    largest = tl.max(maximum, 0)
    merge = tl.exp2(maximum - largest)
    whole = tl.sum(total * merge, 0)
    result = tl.sum(acc * merge[:, None], 0)
    if SPLITS == 1:
        result = tl.where(whole > 0.0, result / whole, 0.0)  # an empty context: a padding row of a graph
        tl.store(out + (row * HEADS + head) * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    else:
        part = (sequence * HEADS + head) * SPLITS + split
        tl.store(partial + part * HEAD_DIM + d, result, mask=d < HEAD_DIM)
        tl.store(maxima + part, largest)
        tl.store(sums + part, whole)


@triton.jit(do_not_specialize=["table_stride"])
def decode_dot(
    q, k_cache, v_cache, k_scales, v_scales, tables, contexts, starts, out, partial, maxima, sums, scale, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """All query heads of one key-value head, one split."""
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    length = split_length(context, SPLITS, BLOCK_N)
    first = split * length
    if (first >= context) & (split > 0):
        return
    last = tl.minimum(first + length, context)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d, n, m = tl.arange(0, DIM), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + m
    inside = m < GROUP
    query = load_heads(q + (row * HEADS + head) * HEAD_DIM, d, inside, HEAD_DIM)
    table = tables + sequence * table_stride
    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    seen = tl.zeros((BLOCK_M,), tl.int32) + last
    for start in range(first, last, BLOCK_N):
        acc, maximum, total = attend_tile(
            acc, maximum, total, query, seen, start + n, start + n < last, table, k_cache, v_cache, k_scales, v_scales,
            kv_head, d, scale, KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, GAIN, False,
        )  # fmt: skip
    if GAIN > 0.0:
        acc = acc / GAIN
    store = inside[:, None] & (d < HEAD_DIM)[None, :]
    if SPLITS == 1:
        acc = tl.where(total[:, None] > 0.0, acc / total[:, None], 0.0)
        at = out + ((row * HEADS + head) * HEAD_DIM)[:, None] + d[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=store)
    else:
        part = (sequence * HEADS + head) * SPLITS + split
        tl.store(partial + (part * HEAD_DIM)[:, None] + d[None, :], acc, mask=store)
        tl.store(maxima + part, maximum, mask=inside)
        tl.store(sums + part, total, mask=inside)


@triton.jit
def decode_reduce(
    partial, maxima, sums, contexts, starts, out,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add the splits of one head in the order of a fixed tree. Empty splits were not written and are skipped."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(starts + sequence).to(tl.int64)
    if tl.load(starts + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DIM)
    used = (split * split_length(context, SPLITS, BLOCK_N) < context) | (split == 0)
    part = (sequence * HEADS + head) * SPLITS + split
    maximum = tl.load(maxima + part, mask=used, other=LOWEST)
    merge = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(tl.load(sums + part, mask=used, other=0.0) * merge, 0)
    at = partial + (part * HEAD_DIM)[:, None] + d[None, :]
    values = tl.load(at, mask=used[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    result = tl.sum(values * merge[:, None], 0)
    result = tl.where(total > 0.0, result / total, 0.0)
    tl.store(out + (row * HEADS + head) * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
