"""y = x · Wᵀ for 5 to 64 rows: NF4 weights decoded in registers, straight into the left operand of the tensor cores.

Two kernels: `nf4_dot` leaves one float32 sum per part of k; `nf4_dot_finish` adds these in a fixed order and finishes
the output (bias, LoRA, residual, SiLU(gate) · up). No atomics: the same bits every time. Knows packed weights and the
LoRA operand, but no layers. Compiled and counted for sm_80 to sm_120; has never run on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.triton.configs import (
    DOT_MAX_ROWS,
    NO_SPILLS,
    DotConfig,
    dot_config,
    dot_splits,
    multiprocessors,
    target_of,
)
from guanaco.kernels.triton.products.lora import LoraStep, lora_arguments, lora_constants, lora_expand, lora_starts
from guanaco.kernels.triton.products.operands import output_width
from guanaco.kernels.triton.products.pack import TABLE_WORDS, TritonNf4
from guanaco.kernels.triton.products.pack_proof import ungrouped

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

_T = [f"{word:#010x}" for word in TABLE_WORDS]


def decode_text(word: str, pairs: tuple[str, str, str, str], note: str = "") -> str:
    """PTX that makes eight float16 from a word of eight codes: codes 2i and 2i + 1 go to register pairs[i].

    A byte look-up in 16 entries is two permutes: for each code one table has the byte, and the other answers with the
    sign of its own table's byte. z is 0, but ptxas doesn't know that: with a constant it would move the tables' words
    from uniform registers before every prmt, which costs one issue slot per weight.
    """
    return f"""
.reg .b32 z, l, m, h, i, q, v, w, a, b, c, d;
mov.u32 z, %lanemask_lt; shr.u32 z, z, 31;{note}
xor.b32 l, z, {_T[0]}; xor.b32 m, z, {_T[2]}; xor.b32 h, z, {_T[4]}; xor.b32 i, z, {_T[6]};
shr.u32 q, {word}, 16; xor.b32 v, {word}, 0x88888888; xor.b32 w, q, 0x8888;
prmt.b32 a, l, {_T[1]}, {word}; prmt.b32 b, m, {_T[3]}, v; xor.b32 a, a, b;
prmt.b32 c, h, {_T[5]}, {word}; prmt.b32 d, i, {_T[7]}, v; xor.b32 c, c, d;
prmt.b32 {pairs[0]}, a, c, 0x5140; prmt.b32 {pairs[1]}, a, c, 0x7362;
prmt.b32 a, l, {_T[1]}, q; prmt.b32 b, m, {_T[3]}, w; xor.b32 a, a, b;
prmt.b32 c, h, {_T[5]}, q; prmt.b32 d, i, {_T[7]}, w; xor.b32 c, c, d;
prmt.b32 {pairs[2]}, a, c, 0x5140; prmt.b32 {pairs[3]}, a, c, 0x7362;
"""


# Called with pack=2 and the same word twice, so that register i is element (word, first) and (word, second) of tensor
# i. Triton doesn't define which elements pack=2 groups. pack_proof.py shows from the PTX that both inputs are one word
# and that the registers go into the products as they are.
_DECODE = "{" + decode_text("$4", ("$0", "$1", "$2", "$3"), "  // pair $4 $5 to $0 $1 $2 $3") + "}"
DECODE = tl.constexpr(_DECODE)
CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")


@triton.jit(do_not_specialize=["rows", "groups_per_split"])
def nf4_dot(
    x, words, absmax, nested, code_map, partial, rows, n, groups_per_split,
    K: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """partial[split, rows, n] = sums over one part of k. Grid: (tiles of n, splits).

    absmax: float32 scales, or with double quantisation GROUPS 8-bit codes in one integer. Inside a group of 64, dot i
    reads column 8 · word + 2i + p as its place 2 · word + p, on both sides.
    """
    IN_ROW: tl.constexpr = K // 64
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    readable = tl.minimum(outputs, n - 1)
    columns = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * groups_per_split
    last = tl.minimum(first + groups_per_split, IN_ROW)
    word_ptr = words + readable[:, None] * (K // 8) + tl.arange(0, 8)[None, :]
    place = tl.arange(0, 16)
    inside = tl.max_contiguous(tl.multiple_of(place // 2 * 8 + place % 2, 2), 2)
    x_ptr = x + tl.minimum(columns, rows - 1)[:, None] * K + inside[None, :]
    flat = readable * IN_ROW
    code_ptr = absmax + readable * (IN_ROW // GROUPS)
    if DOUBLE_QUANT:
        coming = tl.load(code_ptr + tl.minimum(first, IN_ROW - GROUPS) // GROUPS)
    total = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    for group in range(first, last, GROUPS):
        if DOUBLE_QUANT:
            codes = coming.to(tl.int32)
            coming = tl.load(code_ptr + tl.minimum(group + GROUPS, last - GROUPS) // GROUPS)
            # One nested scale serves the turn: 256 is a multiple of GROUPS, and so is the group's number in the whole
            # matrix here.
            nest = nested + ((flat + group) >> 8) * 2
            factor = tl.load(nest)
            offset = tl.load(nest + 1)
        for g in tl.static_range(GROUPS):
            if DOUBLE_QUANT:
                scale = tl.load(code_map + ((codes >> (8 * g)) & 255)) * factor + offset
            else:
                scale = tl.load(absmax + flat + (group + g))
            word = tl.load(word_ptr + (group + g) * 8)
            twice = tl.reshape(tl.broadcast_to(word[:, :, None], (BLOCK_N, 8, 2)), (BLOCK_N, 16))
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                DECODE, CONSTRAINTS, [twice], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True,
                pack=2,
            )  # fmt: skip
            x_here = x_ptr + (group + g) * 64
            sums = tl.dot(w0, tl.trans(tl.load(x_here)))
            sums = tl.dot(w1, tl.trans(tl.load(x_here + 2)), sums)
            sums = tl.dot(w2, tl.trans(tl.load(x_here + 4)), sums)
            sums = tl.dot(w3, tl.trans(tl.load(x_here + 6)), sums)
            total += sums * scale[:, None]
    place_ptr = partial + (tl.program_id(1) * rows + columns)[None, :] * n + outputs[:, None]
    tl.store(place_ptr, total, mask=(columns < rows)[None, :] & (outputs < n)[:, None])


@triton.jit
def finished(
    place, outputs, columns, rows, n, row_factor, bias,
    t, b_table, rank_table, active, factors, module, start1, start2, share_stride,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, RANK: tl.constexpr,
    MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr, SKIP: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """float32 [outputs, columns]: the partial sums at `place` added one after the other, times row factor, plus bias
    and LoRA.

    outputs: rows of W, in the parts FROM … TO − 1. columns: rows of the batch. Both may run over the end. nf4_dequant
    calls it too, with one partial sum.
    """
    known = columns < rows
    mask = (outputs < n)[:, None] & known[None, :]
    total = tl.load(place, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(place + split * share_stride, mask=mask, other=0.0)
    total *= tl.load(row_factor + columns, mask=known, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs < n, other=0.0)[:, None]
    for part in tl.static_range(FROM, TO):
        start = start1 * (part == 1) + start2 * (part == 2)
        end = n
        if PARTS > 1 and part == 0:
            end = start1
        if PARTS > 2 and part == 1:
            end = start2
        in_part = (outputs >= start) & (outputs < end)
        if tl.max(in_part.to(tl.int32), 0) > 0:
            total = lora_expand(
                total, outputs - start, in_part, columns, module + part, part, rows, t, b_table, rank_table, active,
                factors, SLOTS=SLOTS, PARTS=PARTS, RANK=RANK, MAX_ACTIVE=MAX_ACTIVE, ALIGNED=ALIGNED, DOT=True,
                SKIP=SKIP,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["rows", "module", "start1", "start2"])
def nf4_dot_finish(
    partial, y, row_factor, bias, residual, rows, n,
    t, b_table, rank_table, active, factors, module, start1, start2,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """y from the partial sums. Grid: tiles of y's columns; for silu_mul those are half of n (W has gate above up)."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, COLUMNS)
    width = n // 2 if EPILOGUE == "silu_mul" else n
    shares = partial + columns[None, :] * n
    result = finished(
        shares + outputs[:, None], outputs, columns, rows, n, row_factor, bias,
        t, b_table, rank_table, active, factors, module, start1, start2, rows * n,
        SPLITS=SPLITS, HAS_BIAS=HAS_BIAS, PARTS=PARTS, SLOTS=SLOTS, RANK=RANK, MAX_ACTIVE=MAX_ACTIVE, ALIGNED=ALIGNED,
        SKIP=False, FROM=0, TO=1 if EPILOGUE == "silu_mul" and PARTS > 0 else PARTS,
    )  # fmt: skip
    place = columns[None, :] * width + outputs[:, None]
    mask = (outputs < width)[:, None] & (columns < rows)[None, :]
    if EPILOGUE == "silu_mul":
        up = finished(
            shares + outputs[:, None] + width, outputs + width, columns, rows, n, row_factor, bias,
            t, b_table, rank_table, active, factors, module, start1, start2, rows * n,
            SPLITS=SPLITS, HAS_BIAS=HAS_BIAS, PARTS=PARTS, SLOTS=SLOTS, RANK=RANK, MAX_ACTIVE=MAX_ACTIVE,
            ALIGNED=ALIGNED, SKIP=False, FROM=1, TO=PARTS,
        )  # fmt: skip
        result = result / (1.0 + tl.exp(-result)) * up
    if EPILOGUE == "add":
        result += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)


_FINISH_BLOCK_N = 32


def _finish_warps(columns: int, splits: int) -> int:
    """The number of warps: as few as don't spill. Adapters' tiles are small, but all partial sums of a tile are in
    flight."""
    return max(1 if columns <= 16 else 2, columns * splits // 128)


def product(
    x: Tensor,
    row_factor: Tensor,
    weight: TritonNf4,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoraStep | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> None:
    """y = (x · row_factor) · Wᵀ + bias + LoRA, then the epilogue; `output_width` checks the operands. 1 to 64 rows."""
    rows, k = x.shape
    width = output_width(x, row_factor, weight, y, bias, lora, epilogue, residual)
    assert 1 <= rows <= DOT_MAX_ROWS, rows
    assert x.data_ptr() % 16 == weight.words.data_ptr() % 16 == 0, "both are loaded 16 bytes at a time"
    target = target_of(x.device)
    config = dot_config(target, rows, k)
    splits = dot_splits(config, weight.n, k, multiprocessors(x.device))
    partial = torch.empty((splits, rows, weight.n), dtype=torch.float32, device=x.device)
    # The length of every part but the last: a multiple of the groups in one loop turn.
    share = -(-k // 64 // (splits * config.groups)) * config.groups
    nothing = row_factor
    launched = nf4_dot[(-(-weight.n // config.block_n), splits)](
        x, weight.words, _codes(weight, config.groups), weight.nested if weight.double_quant else nothing,
        weight.map if weight.double_quant else nothing, partial, rows, weight.n, share,
        **_dot_constants(config, k, weight.double_quant), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if launched is not None:  # None in the interpreter
        _require_proof(launched)
    nf4_dot_finish[(-(-width // _FINISH_BLOCK_N),)](
        partial, y, row_factor, nothing if bias is None else bias, nothing if residual is None else residual, rows,
        weight.n, *lora_arguments(lora, nothing), *lora_starts(lora, weight.n), BLOCK_N=_FINISH_BLOCK_N,
        COLUMNS=config.columns, SPLITS=splits, EPILOGUE=epilogue, HAS_BIAS=bias is not None, **lora_constants(lora),
        num_warps=_finish_warps(config.columns, splits), num_stages=1, **NO_SPILLS,
    )  # fmt: skip


_proven: set[str] = set()


def _require_proof(kernel: Any) -> None:
    """Raise RuntimeError unless the compiled PTX shows pack=2's grouping. Each variant is read once."""
    if kernel.hash in _proven:
        return
    if wrong := ungrouped(kernel.asm["ptx"]):
        raise RuntimeError(
            f"Triton {triton.__version__} compiles nf4_dot to something else than was proven: {wrong[0]}"
        )
    _proven.add(kernel.hash)


def _codes(weight: TritonNf4, groups: int) -> Tensor:
    """The scales as the kernel loads them: `groups` 8-bit codes in one integer, or float32."""
    if not weight.double_quant:
        return weight.absmax
    return weight.absmax.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[groups])


def _dot_constants(config: DotConfig, k: int, double_quant: bool) -> dict[str, Any]:
    return {
        "K": k,
        "BLOCK_N": config.block_n,
        "COLUMNS": config.columns,
        "GROUPS": config.groups,
        "DOUBLE_QUANT": double_quant,
    }
