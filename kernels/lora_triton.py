"""LoRA in Triton: x · Aᵀ of every active adapter in one launch, and the expand that the products' epilogues call.

A row's delta is factor · scale · B (A x), summed in float32. Adapters are addresses in tables, so one launch (and one
CUDA graph) serves any mix of them at their exact ranks. Sums have a fixed order: no atomics. Knows no adapters' names;
the provider builds `TritonLora`, the product kernels eat `LoraStep`. Has never run on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.triton_compile import CompileCase

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)
_ALIGNMENT = 8  # fp16 elements: ranks and addresses that are multiples of 16 bytes are loaded 16 bytes at a time


@dataclass(frozen=True)
class TritonLora:
    """The adapters of one step, in memory that stays where it is from step to step.

    Matrices are float16, A [rank, k] and B [n, rank] row by row; rank 0: the slot leaves the module alone.
    """

    a_ptr: Tensor  # int64 [modules, slots]: addresses
    b_ptr: Tensor  # int64 [modules, slots]
    rank: Tensor  # int32 [modules, slots]
    scale: Tensor  # float32 [modules, slots]
    active_slots: Tensor  # int32 [max_active], −1 where there is none
    factors: Tensor  # float32 [max_active, rows]: 0 where the row doesn't use the adapter
    max_rank: int  # of RANK_BUCKETS: no active adapter has a larger rank
    rows: int
    aligned: bool = False  # all ranks are multiples of 8 and all addresses of 16

    def __post_init__(self) -> None:
        assert self.max_rank in RANK_BUCKETS, self.max_rank
        assert self.factors.shape == (self.max_active, self.rows), (self.factors.shape, self.max_active, self.rows)
        assert self.a_ptr.dtype == self.b_ptr.dtype == torch.int64
        assert self.rank.shape == self.scale.shape == self.a_ptr.shape == self.b_ptr.shape

    @property
    def max_active(self) -> int:
        return self.active_slots.shape[0]

    @property
    def num_slots(self) -> int:
        return self.rank.shape[1]


@dataclass(frozen=True)
class LoraStep:
    """What the epilogue of one product needs: `shrink`'s result and where each part of the output begins."""

    t: Tensor  # float32 [max_active, parts, rows, max_rank]; only rows that use the adapter are written
    lora: TritonLora
    modules: tuple[int, ...]  # consecutive
    part_starts: tuple[int, ...]  # first output row of each part

    @property
    def parts(self) -> int:
        return len(self.modules)


def rank_bucket(rank: int) -> int:
    """The smallest bucket that holds `rank`; AssertionError beyond the largest."""
    assert 0 <= rank <= RANK_BUCKETS[-1], rank
    return next(b for b in RANK_BUCKETS if rank <= b)


# ---- shrink


@triton.jit
def _nth_used_row(used, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 [BLOCK]: rows number first … first + BLOCK − 1 among those that are used, −1 where there are no more."""
    place = tl.cumsum(used.to(tl.int32), 0) - 1
    wanted = first + tl.arange(0, BLOCK)
    hit = used[None, :] & (place[None, :] == wanted[:, None])
    return tl.sum(tl.where(hit, tl.arange(0, ROWS)[None, :] + 1, 0), 1) - 1


@triton.jit(do_not_specialize=["module", "rows"])
def lora_shrink(
    x, row_factor, t, a_table, rank_table, scale_table, active, factors, module, rows,
    K: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """t[adapter, part, row, rank] for BLOCK_ROWS rows that use one adapter, BLOCK_RANK rows of A, and all of K.

    Grid: (rank tiles · parts, max_active, row blocks). LANES: threads; BLOCK_K / LANES neighbours are summed in one.
    """
    part = tl.program_id(0) % PARTS
    first_rank = tl.program_id(0) // PARTS * BLOCK_RANK
    index = tl.program_id(1)
    slot = tl.load(active + index)
    if slot < 0:
        return
    entry = (module + part) * SLOTS + slot
    rank = tl.load(rank_table + entry)
    if rank == 0:
        return
    every = tl.arange(0, ROWS)
    factor = tl.load(factors + index * rows + every, mask=every < rows, other=0.0)
    mine = _nth_used_row(factor != 0, tl.program_id(2) * BLOCK_ROWS, ROWS, BLOCK_ROWS)
    if tl.max(mine, 0) < 0:
        return
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    a = tl.load(a_table + entry).to(tl.pointer_type(tl.float16)) + ranks[:, None].to(tl.int64) * K
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK, LANES), tl.float32)
    if first_rank < rank:
        for k in range(0, K, BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            a_tile = tl.load(a + columns[None, :], mask=(ranks < rank)[:, None] & (columns < K)[None, :], other=0.0)
            x_mask = (mine >= 0)[:, None] & (columns < K)[None, :]
            x_tile = tl.load(x + mine[:, None].to(tl.int64) * K + columns[None, :], mask=x_mask, other=0.0)
            product = a_tile.to(tl.float32)[None, :, :] * x_tile.to(tl.float32)[:, None, :]
            total += tl.sum(tl.reshape(product, (BLOCK_ROWS, BLOCK_RANK, LANES, BLOCK_K // LANES)), 3)
    sums = tl.sum(total, 2)
    weight = tl.load(factors + index * rows + mine, mask=mine >= 0, other=0.0) * tl.load(scale_table + entry)
    weight *= tl.load(row_factor + mine, mask=mine >= 0, other=0.0)
    place = ((index * PARTS + part) * rows + mine[:, None]) * RANK + ranks[None, :]
    tl.store(t + place, sums * weight[:, None], mask=(mine >= 0)[:, None] & (ranks < RANK)[None, :])


def shrink(
    x: Tensor, row_factor: Tensor, lora: TritonLora, modules: Sequence[int], part_starts: Sequence[int]
) -> LoraStep:
    """t of all projections that share x: float16 [rows, k] times float32 row_factor [rows]. One launch.

    modules: consecutive modules, in the order of the parts of the merged output; part_starts: their first output rows.
    """
    assert tuple(modules) == tuple(range(modules[0], modules[0] + len(modules))), modules
    assert x.dtype == torch.float16
    assert x.is_contiguous()
    assert x.shape[0] == lora.rows == row_factor.shape[0], (x.shape, lora.rows, row_factor.shape)
    parts = len(modules)
    t = torch.empty((lora.max_active, parts, lora.rows, lora.max_rank), dtype=torch.float32, device=x.device)
    step = LoraStep(t, lora, tuple(modules), tuple(part_starts))
    if lora.rows == 0:
        return step
    c = shrink_config(lora.rows, lora.max_rank)
    grid = (-(-lora.max_rank // c["BLOCK_RANK"]) * parts, lora.max_active, -(-lora.rows // c["BLOCK_ROWS"]))
    lora_shrink[grid](
        x, row_factor, t, lora.a_ptr, lora.rank, lora.scale, lora.active_slots, lora.factors, modules[0], lora.rows,
        K=x.shape[1], SLOTS=lora.num_slots, PARTS=parts, RANK=lora.max_rank, **c, num_warps=_SHRINK_WARPS,
    )  # fmt: skip
    return step


_SHRINK_WARPS = 4


def shrink_config(rows: int, max_rank: int) -> dict[str, int]:
    """Tile sizes for a batch of `rows` rows: few rows of A a program, so that a single adapter fills many."""
    block_rows = min(8, triton.next_power_of_2(rows))
    return {
        "ROWS": triton.next_power_of_2(rows),
        "BLOCK_ROWS": block_rows,
        "BLOCK_RANK": min(4, max_rank) if block_rows > 1 else 2,
        "BLOCK_K": 1024,
        "LANES": 32 * _SHRINK_WARPS,
    }


def compile_cases(target: str) -> list[CompileCase]:  # noqa: ARG001  the same for all
    """`lora_shrink` as a 7B model launches it; a unit is an element of A."""
    cases = []
    for rows, rank, k, parts, active in ((1, 64, 4096, 3, 1), (8, 16, 4096, 3, 8), (8, 64, 11008, 1, 8)):
        c = shrink_config(rows, rank)
        floats = dict.fromkeys(("row_factor", "t", "scale_table", "factors"), "*fp32")
        integers = {"a_table": "*i64", "rank_table": "*i32", "active": "*i32", "module": "i32", "rows": "i32"}
        cases.append(
            CompileCase(
                kernel="lora_shrink", function=lora_shrink, rows=rows, config=f"rank {rank}, k {k}, {active} adapters",
                signature={"x": "*fp16", **floats, **integers},
                constexprs={"K": k, "SLOTS": 16, "PARTS": parts, "RANK": rank, **c},
                num_warps=_SHRINK_WARPS, units_per_iteration=c["BLOCK_RANK"] * c["BLOCK_K"],
                marker=("bytes", 2.0 * (1 + c["BLOCK_ROWS"] / c["BLOCK_RANK"])),
                units=active * parts * rank * k, bytes_floor=2 * active * parts * rank * k + 2 * rows * k,
                bytes_per_unit=2.0, not_divisible=("module", "rows"), loop_turns={-1: float(c["BLOCK_RANK"] * k)},
            )
        )  # fmt: skip
    return cases


# ---- expand


@triton.jit
def lora_expand(
    acc, b_rows, in_part, columns, module, part, rows, t, b_table, rank_table, active, factors,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr,
    DOT: tl.constexpr, SKIP: tl.constexpr = False,
):  # fmt: skip
    """acc [outputs, rows] plus Σ over active adapters of B · t, for the outputs of one part; called in an epilogue.

    b_rows int32 [outputs]: rows of B (of the part, not of the merged matrix), read where in_part; columns int32 [rows]:
    rows of the batch. module: of this part. Elements whose row doesn't use an adapter keep their bits. DOT: on tensor
    cores, B exact in tf32 and t as a sum of two tf32; at least 16 outputs and 8 rows then. SKIP: adapters that none of
    these rows uses are not read, which pays where a batch is more than one block of rows.
    """
    CHUNK: tl.constexpr = RANK if RANK < 32 else 32
    STEP: tl.constexpr = 16 if DOT and CHUNK < 16 else CHUNK
    known = columns < rows
    for index in range(MAX_ACTIVE):
        slot = tl.load(active + index)
        entry = module * SLOTS + slot
        rank = tl.load(rank_table + entry, mask=slot >= 0, other=0)
        if rank > 0:
            used = tl.load(factors + index * rows + columns, mask=known, other=0.0) != 0
            b = tl.load(b_table + entry).to(tl.pointer_type(tl.float16))
            if ALIGNED:
                b = tl.multiple_of(b, 16)
                rank = tl.multiple_of(rank, 8)
            place = t + ((index * PARTS + part) * rows + columns) * RANK
            delta = acc
            end = rank * tl.max(used.to(tl.int32), 0) if SKIP else rank
            for first in range(0, end, STEP):
                ranks = first + tl.arange(0, STEP)
                b_mask = in_part[:, None] & (ranks < rank)[None, :]
                b_tile = tl.load(b + b_rows[:, None].to(tl.int64) * rank + ranks[None, :], mask=b_mask, other=0.0)
                t_mask = (ranks < rank)[:, None] & used[None, :]
                t_tile = tl.load(place[None, :] + ranks[:, None], mask=t_mask, other=0.0)
                if DOT:
                    high = (t_tile.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
                    wide = b_tile.to(tl.float32)
                    delta = tl.dot(wide, t_tile - high, delta, input_precision="tf32")
                    delta = tl.dot(wide, high, delta, input_precision="tf32")
                else:
                    delta += tl.sum(b_tile.to(tl.float32)[:, :, None] * t_tile[None, :, :], 1)
            acc = tl.where(used[None, :] & in_part[:, None], delta, acc)
    return acc


@triton.jit
def lora_expand_tile(
    acc, weight_row, inside, first, last, columns, rows, t, b_table, rank_table, active, factors, module,
    N: tl.constexpr, START1: tl.constexpr, START2: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`lora_expand` of a tile of a merged output, in whichever parts the tile lies.

    weight_row int32 [outputs]: rows of the merged matrix, valid where inside; first, last: the lowest and the highest.
    START1, START2: where the second and the third part begin, N if there is none.
    """
    first_part = (first >= START1).to(tl.int32) + (first >= START2).to(tl.int32)
    last_part = (last >= START1).to(tl.int32) + (last >= START2).to(tl.int32)
    for part in range(first_part, last_part + 1):
        start = tl.where(part == 0, 0, tl.where(part == 1, START1, START2))
        end = tl.where(part == 0, START1, tl.where(part == 1, START2, N))
        mine = inside & (weight_row >= start) & (weight_row < end)
        acc = lora_expand(
            acc, weight_row - start, mine, columns, module + part, part, rows, t, b_table, rank_table, active, factors,
            SLOTS, PARTS, RANK, MAX_ACTIVE, ALIGNED, DOT,
        )  # fmt: skip
    return acc


def lora_arguments(step: LoraStep | None, nothing: Tensor) -> tuple[Tensor | int, ...]:
    """A product's arguments t, b_table, rank_table, active, factors, module; without LoRA they aren't read."""
    if step is None:
        return (*(nothing,) * 5, 0)
    lora = step.lora
    return step.t, lora.b_ptr, lora.rank, lora.active_slots, lora.factors, step.modules[0]


def lora_constants(step: LoraStep | None, n: int) -> dict[str, int | bool]:
    """A product's constexprs for an output of n rows."""
    if step is None:
        return {"SLOTS": 1, "RANK": 8, "MAX_ACTIVE": 0, "ALIGNED": False, "PARTS": 1, "START1": n, "START2": n}
    assert step.parts <= 3, step.modules
    assert step.part_starts[0] == 0, step.part_starts
    starts = (*step.part_starts[1:], n, n)
    lora = step.lora
    return {
        "SLOTS": lora.num_slots, "RANK": lora.max_rank, "MAX_ACTIVE": lora.max_active, "ALIGNED": lora.aligned,
        "PARTS": step.parts, "START1": starts[0], "START2": starts[1],
    }  # fmt: skip
