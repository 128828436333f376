"""LoRA in Triton: x · Aᵀ of every active adapter in one launch, and the expand step that the products' epilogues call.

A row's delta is factor · scale · B (A x), summed in float32. Adapters are addresses in tables, so one launch (and one
CUDA graph) serves any mix of them at their exact ranks. Sums have a fixed order: no atomics. Knows no adapter names.
The provider builds `TritonLora`, the product kernels read `LoraStep`. Has never run on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.triton.configs import NO_SPILLS, target_of
from guanaco.kernels.triton.products.lora_prompt import PROMPT_ROWS, PROMPT_TARGETS, shrink_prompt

RANK_BUCKETS = (8, 16, 32, 64, 128, 256)
_ALIGNMENT = 8  # fp16 elements: ranks and addresses that are multiples of 16 bytes are loaded 16 bytes at a time


@dataclass(frozen=True)
class TritonLora:
    """The adapters of one step. The four tables are those of `AdapterTables`, written in place from step to step.

    Matrices are float16, A [rank, k] and B [n, rank], row-major. Rank 0: the adapter in the slot doesn't change the
    module.
    """

    a_ptr: Tensor  # int64 [modules, slots]: addresses
    b_ptr: Tensor  # int64 [modules, slots]
    rank: Tensor  # int32 [modules, slots]
    scale: Tensor  # float32 [modules, slots]
    active_slots: Tensor  # int32 [max_active], −1 if unused
    factors: Tensor  # float32 [max_active, rows]: 0 where the row doesn't use the adapter
    max_rank: int  # a number in RANK_BUCKETS; no active adapter has a larger rank
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
    """The smallest bucket that holds `rank`. AssertionError if `rank` exceeds the largest."""
    assert 0 <= rank <= RANK_BUCKETS[-1], rank
    return next(b for b in RANK_BUCKETS if rank <= b)


# ---- shrink

# Eight float16 → float32. In asm, so that the layout stays the pointers' own (all lanes along K), and so that data
# without 16-byte alignment needs no kernel of its own.
_UNPACK = """
mov.b32 {h0, h1}, r0; mov.b32 {h2, h3}, r1; mov.b32 {h4, h5}, r2; mov.b32 {h6, h7}, r3;
cvt.f32.f16 $0, h0; cvt.f32.f16 $1, h1; cvt.f32.f16 $2, h2; cvt.f32.f16 $3, h3;
cvt.f32.f16 $4, h4; cvt.f32.f16 $5, h5; cvt.f32.f16 $6, h6; cvt.f32.f16 $7, h7;
"""
_LOAD = tl.constexpr(
    "{.reg .b32 r<4>; .reg .b16 h<8>; ld.global.nc.v4.b32 {r0, r1, r2, r3}, [$8];" + _UNPACK + "}",
)
_LOAD_NARROW = tl.constexpr(
    "{.reg .b32 r<4>; .reg .b16 h<8>;"
    + "".join(f"ld.global.nc.u16 h{i}, [$8+{2 * i}];" for i in range(8))
    + "".join(f"mov.b32 r{i}, {{h{2 * i}, h{2 * i + 1}}};" for i in range(4))
    + _UNPACK
    + "}"
)
_LOAD_CONSTRAINTS = tl.constexpr("=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,l")
_FMA = tl.constexpr(
    "fma.rn.f32 $0, $2, $10, $1;" + "".join(f"fma.rn.f32 $0, ${2 + i}, ${10 + i}, $0;" for i in range(1, 8))
)
_FMA_CONSTRAINTS = tl.constexpr("=&f" + 17 * ",f")


@triton.jit
def _load(pointers, ALIGNED: tl.constexpr):
    """Eight float32 tensors, from eight neighbouring float16 at each pointer."""
    return tl.inline_asm_elementwise(
        _LOAD if ALIGNED else _LOAD_NARROW, _LOAD_CONSTRAINTS, [pointers],
        (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _add_products(total, a, x, inside, TAIL: tl.constexpr):
    """total [ranks, lanes] + a · x. a: eight tensors [ranks, lanes]; x: pointers to eight neighbouring elements
    [lanes]."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    x0, x1, x2, x3, x4, x5, x6, x7 = _load(x, True)
    operands = [
        total, a0, a1, a2, a3, a4, a5, a6, a7, x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :],
        x5[None, :], x6[None, :], x7[None, :],
    ]  # fmt: skip
    new = tl.inline_asm_elementwise(_FMA, _FMA_CONSTRAINTS, operands, tl.float32, is_pure=True, pack=1)
    return tl.where(inside[None, :], new, total) if TAIL else new


@triton.jit
def _used_row(used, place, nth, ROWS: tl.constexpr):
    """The row that is number nth among the used rows; −1 if there are fewer."""
    return tl.sum(tl.where(used & (place == nth), tl.arange(0, ROWS) + 1, 0), 0) - 1


@triton.jit
def _store_t(t, total, row, base, ranks, rank, scale, factors, row_factor, rows, RANK: tl.constexpr):
    """Store one row's sums, scaled, in t[base, row, ranks]: zeros from `rank` on, nothing for row −1."""
    weight = tl.load(factors + row, mask=row >= 0, other=0.0) * tl.load(row_factor + row, mask=row >= 0, other=0.0)
    sums = tl.where(ranks < rank, tl.sum(total, 1) * (weight * scale), 0.0)
    tl.store(t + (base * rows + row) * RANK + ranks, sums, mask=ranks < tl.where(row >= 0, RANK, 0))


@triton.jit(do_not_specialize=["module", "rows"])
def lora_shrink(
    x, row_factor, t, a_table, rank_table, scale_table, active, factors, module, rows,
    K: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """t[adapter, part, row, rank] for BLOCK_ROWS (1, 2 or 4) rows that use one adapter and BLOCK_RANK rows of A.

    Grid: (rank tiles · parts, max_active, row blocks). LANES: threads; each reads every LANES-th group of eight
    elements.
    """
    CHUNKS: tl.constexpr = K // 8
    TAIL: tl.constexpr = CHUNKS % LANES != 0
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
    factors += index * rows
    used = tl.load(factors + every, mask=every < rows, other=0.0) != 0
    place = tl.cumsum(used.to(tl.int32), 0) - 1
    first = tl.program_id(2) * BLOCK_ROWS
    row0 = _used_row(used, place, first, ROWS)
    if row0 < 0:
        return
    row1 = _used_row(used, place, first + 1, ROWS) if BLOCK_ROWS > 1 else row0
    row2 = _used_row(used, place, first + 2, ROWS) if BLOCK_ROWS > 2 else row0
    row3 = _used_row(used, place, first + 3, ROWS) if BLOCK_ROWS > 2 else row0
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    total0 = tl.zeros((BLOCK_RANK, LANES), tl.float32)
    total1, total2, total3 = total0, total0, total0
    if first_rank < rank:
        # Beyond the rank this reads its last row again, and beyond the used rows the first of them; neither is stored.
        a_rows = tl.minimum(ranks, rank - 1)[:, None] * K
        a = tl.load(a_table + entry).to(tl.pointer_type(tl.float16)) + a_rows
        for start in tl.range(0, CHUNKS, LANES, loop_unroll_factor=UNROLL):
            chunk = start + tl.arange(0, LANES)
            inside = chunk < CHUNKS
            column = (tl.minimum(chunk, CHUNKS - 1) if TAIL else chunk) * 8
            eights = _load(a + column[None, :], ALIGNED)
            total0 = _add_products(total0, eights, x + row0 * K + column, inside, TAIL)
            if BLOCK_ROWS > 1:
                total1 = _add_products(total1, eights, x + tl.maximum(row1, 0) * K + column, inside, TAIL)
            if BLOCK_ROWS > 2:
                total2 = _add_products(total2, eights, x + tl.maximum(row2, 0) * K + column, inside, TAIL)
                total3 = _add_products(total3, eights, x + tl.maximum(row3, 0) * K + column, inside, TAIL)
    scale = tl.load(scale_table + entry)
    base = index * PARTS + part
    _store_t(t, total0, row0, base, ranks, rank, scale, factors, row_factor, rows, RANK)
    if BLOCK_ROWS > 1:
        _store_t(t, total1, row1, base, ranks, rank, scale, factors, row_factor, rows, RANK)
    if BLOCK_ROWS > 2:
        _store_t(t, total2, row2, base, ranks, rank, scale, factors, row_factor, rows, RANK)
        _store_t(t, total3, row3, base, ranks, rank, scale, factors, row_factor, rows, RANK)


def shrink(
    x: Tensor, row_factor: Tensor, lora: TritonLora, modules: Sequence[int], part_starts: Sequence[int]
) -> LoraStep:
    """Scaled x · Aᵀ for all projections that share x: float16 [rows, k] times float32 row_factor [rows]. One launch.

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
    if lora.rows >= PROMPT_ROWS and target_of(x.device) in PROMPT_TARGETS:
        tables = (lora.a_ptr, lora.rank, lora.scale, lora.active_slots, lora.factors)
        shrink_prompt(x, row_factor, t, tables, modules[0], lora.num_slots, lora.aligned)
        return step
    assert x.data_ptr() % 16 == 0, "x is loaded 16 bytes at a time"
    c = shrink_config(x.shape[1], lora.rows, lora.max_rank)
    grid = (-(-lora.max_rank // c["BLOCK_RANK"]) * parts, lora.max_active, -(-lora.rows // c["BLOCK_ROWS"]))
    lora_shrink[grid](
        x, row_factor, t, lora.a_ptr, lora.rank, lora.scale, lora.active_slots, lora.factors, modules[0], lora.rows,
        K=x.shape[1], SLOTS=lora.num_slots, PARTS=parts, RANK=lora.max_rank, ALIGNED=lora.aligned, **c,
        num_warps=c["LANES"] // 32, **NO_SPILLS,
    )  # fmt: skip
    return step


def shrink_config(k: int, rows: int, max_rank: int) -> dict[str, int]:
    """Tile sizes. Few rows of A per program, so that a single adapter fills many programs; more if rows are short.

    With a single row, which has one adapter as a rule, programs are few, so each one has more loads in flight.
    """
    return {
        "ROWS": triton.next_power_of_2(rows),
        "BLOCK_ROWS": 1 if rows == 1 else 2 if rows == 2 else 4,
        "BLOCK_RANK": min(max_rank, 16 if k < 2048 else 2 if rows == 1 else 4),
        "LANES": 128 if k >= 2048 else 32,
        "UNROLL": 4 if rows == 1 and k >= 2048 else 1,
    }


# ---- expand


@triton.jit
def lora_expand(
    acc, b_rows, in_part, columns, module, part, rows, t, b_table, rank_table, active, factors,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr,
    DOT: tl.constexpr, SKIP: tl.constexpr = False,
):  # fmt: skip
    """acc [outputs, rows] plus Σ over active adapters of B · t, for the outputs of one part. Called in an epilogue.

    b_rows int32 [outputs]: rows of B (counted in the part, not in the merged matrix), read if in_part. columns int32
    [rows]: rows of the batch. module: the module of this part. Elements of rows that don't use an adapter keep their
    bits.
    DOT: use tensor cores, with B exact in tf32 and t as a sum of two tf32 numbers; needs at least 16 outputs and 8
    rows.
    SKIP: don't read adapters that none of these rows uses; this pays if a batch is more than one block of rows.
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
    """`lora_expand` for a tile of a merged output; the tile may lie in several parts.

    weight_row int32 [outputs]: rows of the merged matrix, valid if inside; first, last: the lowest and the highest.
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
    """A product kernel's arguments t, b_table, rank_table, active, factors, module. Without LoRA they aren't read."""
    if step is None:
        return (*(nothing,) * 5, 0)
    lora = step.lora
    return step.t, lora.b_ptr, lora.rank, lora.active_slots, lora.factors, step.modules[0]


def lora_constants(step: LoraStep | None) -> dict[str, int | bool]:
    """A product kernel's constexprs; PARTS 0 means no LoRA."""
    if step is None:
        return {"PARTS": 0, "SLOTS": 1, "RANK": 8, "MAX_ACTIVE": 1, "ALIGNED": False}
    lora = step.lora
    return {
        "PARTS": step.parts, "SLOTS": lora.num_slots, "RANK": lora.max_rank, "MAX_ACTIVE": lora.max_active,
        "ALIGNED": lora.aligned,
    }  # fmt: skip


def lora_starts(step: LoraStep | None, n: int) -> tuple[int, int]:
    """The first outputs of the second and the third part; n for a part that doesn't exist."""
    if step is None:
        return n, n
    assert step.parts <= 3, step.modules
    assert step.part_starts[0] == 0, step.part_starts
    second, third = (*step.part_starts[1:], n, n)[:2]
    return second, third
