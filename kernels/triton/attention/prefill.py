"""The Triton kernel for sequences with several new tokens: causal attention of a chunk over its whole context.

Rows of a tile are (token, query head of the group) pairs. The grid depends on shapes alone; each program finds its
sequence by bisecting cu_seqlens_q in device memory. Launched by paged.py.
"""

import triton
import triton.language as tl

from guanaco.kernels.triton.attention.decode import LOWEST
from guanaco.kernels.triton.attention.tiles import attend_tile, load_heads


@triton.jit
def _sequence_of(starts, index, num_sequences, BLOCK_Q: tl.constexpr):
    """The last sequence i with starts[i] // BLOCK_Q + i ≤ index. Each sequence has room for its blocks before the next
    begins."""
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_Q + middle <= index:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["table_stride", "num_sequences"])
def prefill(
    q, k_cache, v_cache, k_scales, v_scales, tables, contexts, starts, out, scale, table_stride, num_sequences,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GAIN: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """BLOCK_M // GROUP tokens of one sequence, all query heads of one key-value head.

    APART: tiles without a masked score have their own loop. That saves a fifth of the instructions. Before compute
    capability 9.0 ptxas spills between the loops, and tensor cores are the limit either way, so it is off there.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    index, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(starts, index, num_sequences, BLOCK_Q)
    start = tl.load(starts + sequence)
    new = tl.load(starts + sequence + 1) - start
    first_token = (index - start // BLOCK_Q - sequence) * BLOCK_Q
    if (first_token >= new) | (new == 1):
        return
    context = tl.load(contexts + sequence)
    d, n, m = tl.arange(0, DIM), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    token = first_token + m // GROUP
    inside = (token < new) & (m < BLOCK_Q * GROUP)
    row = ((start + token).to(tl.int64) * HEADS + kv_head * GROUP + m % GROUP) * HEAD_DIM
    query = load_heads(q + row, d, inside, HEAD_DIM)
    table = tables + tl.cast(sequence, tl.int64) * table_stride
    maximum = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    seen = context - new + token + 1  # positions that each row sees
    last = tl.minimum(context - new + first_token + BLOCK_Q, context)
    edge = 0
    if APART:
        # Every row sees all positions of the first tiles; only the last tiles contain the causal edge and the context's
        # end.
        edge = (context - new + first_token + 1) // BLOCK_N * BLOCK_N
        for position in range(0, edge, BLOCK_N):
            acc, maximum, total = attend_tile(
                acc, maximum, total, query, seen, position + n, position + n < last, table, k_cache, v_cache, k_scales,
                v_scales, kv_head, d, scale, KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, GAIN, True,
            )  # fmt: skip
    for position in range(edge, last, BLOCK_N):
        acc, maximum, total = attend_tile(
            acc, maximum, total, query, seen, position + n, position + n < last, table, k_cache, v_cache, k_scales,
            v_scales, kv_head, d, scale, KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, GAIN, False,
        )  # fmt: skip
    if GAIN > 0.0:
        acc = acc / GAIN
    acc = acc / total[:, None]
    at = out + row[:, None] + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])
