"""LoRA's shrink for prompts: x · Aᵀ of every active adapter on tensor cores. Blocks without a row that uses the adapter
are skipped.

`lora.shrink` launches this from PROMPT_ROWS rows on, on PROMPT_TARGETS. Operands and result are those of the kernel for
few rows, and sums are float32 too.
"""

import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.triton.configs import TARGETS

# With fewer rows, each adapter has only a few of them, and the kernel for single rows reads less. Triton 3.9 has no
# tensor-core code for sm_75, so the other kernel serves any number of rows there.
PROMPT_ROWS = 65
PROMPT_TARGETS = tuple(target for target in TARGETS if target != "sm_75")
_ROWS, _K, _WARPS, _STAGES = 64, 64, 4, 3


@triton.jit(do_not_specialize=["module", "rows"])
def lora_shrink_prompt(
    x, row_factor, t, a_table, rank_table, scale_table, active, factors, module, rows,
    K: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """t[adapter, part, row, rank] for the rows of a block that use the adapter.

    Grid: (row blocks, max_active, rank tiles · parts).
    """
    part = tl.program_id(2) % PARTS
    first_rank = tl.program_id(2) // PARTS * BLOCK_RANK
    index = tl.program_id(1)
    slot = tl.load(active + index)
    if slot < 0:
        return
    entry = (module + part) * SLOTS + slot
    rank = tl.load(rank_table + entry)
    if rank == 0:
        return
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    factor = tl.load(factors + index * rows + row, mask=row < rows, other=0.0)
    if tl.max(tl.abs(factor), 0) == 0:
        return
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    # Rows beyond the end and ranks beyond the adapter's read valid memory; the results are dropped below.
    x_row = x + tl.minimum(row, rows - 1)[:, None].to(tl.int64) * K
    a = tl.load(a_table + entry).to(tl.pointer_type(tl.float16))
    if ALIGNED:
        a = tl.multiple_of(a, 16)
    a_row = a + tl.minimum(ranks, rank - 1)[None, :].to(tl.int64) * K
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
    for k in range(0, K, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            x_tile = tl.load(x_row + column[None, :])
            a_tile = tl.load(a_row + column[:, None])
        else:
            x_tile = tl.load(x_row + column[None, :], mask=(column < K)[None, :], other=0.0)
            a_tile = tl.load(a_row + column[:, None], mask=(column < K)[:, None], other=0.0)
        total = tl.dot(x_tile, a_tile, total)
    weight = factor * tl.load(scale_table + entry) * tl.load(row_factor + row, mask=row < rows, other=0.0)
    result = tl.where((ranks < rank)[None, :], total * weight[:, None], 0.0)
    place = ((index * PARTS + part) * rows + row[:, None]) * RANK + ranks[None, :]
    tl.store(t + place, result, mask=(factor != 0)[:, None] & (ranks < RANK)[None, :])


def _block_rank(max_rank: int) -> int:
    return min(64, max(16, int(triton.next_power_of_2(max_rank))))


def shrink_prompt(
    x: Tensor, row_factor: Tensor, t: Tensor, tables: tuple[Tensor, ...], module: int, num_slots: int, aligned: bool
) -> None:
    """t [max_active, parts, rows, max_rank] from x [rows, k]; tables: a_ptr, rank, scale, active_slots, factors."""
    max_active, parts, rows, max_rank = t.shape
    block_rank = _block_rank(max_rank)
    grid = (-(-rows // _ROWS), max_active, -(-max_rank // block_rank) * parts)
    lora_shrink_prompt[grid](
        x, row_factor, t, *tables, module, rows, K=x.shape[1], SLOTS=num_slots, PARTS=parts, RANK=max_rank,
        ALIGNED=aligned, BLOCK_ROWS=_ROWS, BLOCK_RANK=block_rank, BLOCK_K=_K, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
