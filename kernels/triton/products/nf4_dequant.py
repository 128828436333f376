"""y = x · Wᵀ for prompts: NF4 weights decoded once, a slice of W at a time, and multiplied by the library.

One kernel decodes codes and both levels of scales to 16 bits, torch multiplies with float32 sums, and one kernel
finishes the output (bias, LoRA, residual, SiLU(gate) · up). It works for any number of rows. It is used from 65 rows
on, and on sm_75, for which Triton 3.9 has no tensor-core code, from 9 rows on. Has never run on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.triton.configs import NO_SPILLS
from guanaco.kernels.triton.products.lora import LoraStep, lora_arguments, lora_constants, lora_starts
from guanaco.kernels.triton.products.nf4_dot import decode_text, finished
from guanaco.kernels.triton.products.operands import output_width
from guanaco.kernels.triton.products.pack import TritonNf4

# A slice of W in float16: 32 MiB, a square matrix of 4096. Expected, not measured: larger slices aren't multiplied
# faster, and smaller ones are slower.
SLICE_WEIGHTS = 16 << 20
_GROUPS = 64  # groups of 64 weights per program
_WARPS = 4
_FINISH_OUTPUTS, _FINISH_ROWS = 64, 16  # outputs and rows per program

_DECODE = (
    "{ .reg .b32 e, f, g, p;"
    + decode_text("$8", ("e", "f", "g", "p"))
    + "mov.b32 {$0, $1}, e; mov.b32 {$2, $3}, f; mov.b32 {$4, $5}, g; mov.b32 {$6, $7}, p; }"
)
DECODE = tl.constexpr(_DECODE)
CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")


@triton.jit(do_not_specialize=["first_group", "num_groups"])
def nf4_dequant(
    words, absmax, nested, code_map, out, first_group, num_groups, GROUPS: tl.constexpr, DOUBLE_QUANT: tl.constexpr
):
    """out[64 · num_groups]: the weights of groups first_group … of the flattened matrix, in out's type."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    known = group < num_groups
    flat = first_group + group
    scale = tl.load(absmax + flat, mask=known, other=0)
    if DOUBLE_QUANT:
        nest = nested + (flat >> 8) * 2
        factor = tl.load(nest, mask=known, other=0.0)
        offset = tl.load(nest + 1, mask=known, other=0.0)
        scale = tl.load(code_map + scale.to(tl.int32)) * factor + offset
    word = tl.load(words + flat[:, None] * 8 + tl.arange(0, 8)[None, :], mask=known[:, None], other=0)
    e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
        DECODE, CONSTRAINTS, [word],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True, pack=1,
    )  # fmt: skip
    # [groups, words, 2, 2, 2]: the last axis is the lowest bit of the place in the word.
    levels = tl.join(
        tl.join(tl.join(e0, e4), tl.join(e2, e6)),
        tl.join(tl.join(e1, e5), tl.join(e3, e7)),
    )
    weights = tl.reshape(levels, (GROUPS, 64)).to(tl.float32) * scale[:, None]
    place = out + group[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(place, weights.to(out.dtype.element_ty), mask=known[:, None])


@triton.jit(do_not_specialize=["rows", "module", "start1", "start2", "first", "count"])
def nf4_dequant_finish(
    sums, y, row_factor, bias, residual, rows, n, first, count,
    t, b_table, rank_table, active, factors, module, start1, start2,
    OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    SLOTS: tl.constexpr, RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Columns first … first + count of y from sums [rows, count], or from [rows, 2 · count] (gate, then up) for
    silu_mul."""
    inside = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # There are no sums beyond the slice: outputs beyond it are treated as beyond the matrix.
    outputs = tl.where(inside < count, first + inside, n)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = n
    stride = count
    if EPILOGUE == "silu_mul":
        width = n // 2
        stride = 2 * count
    place = sums + columns[None, :] * stride + inside[:, None]
    result = finished(
        place, outputs, columns, rows, n, row_factor, bias,
        t, b_table, rank_table, active, factors, module, start1, start2, 0,
        SPLITS=1, HAS_BIAS=HAS_BIAS, PARTS=PARTS, SLOTS=SLOTS, RANK=RANK, MAX_ACTIVE=MAX_ACTIVE, ALIGNED=ALIGNED,
        SKIP=True, FROM=0, TO=1 if EPILOGUE == "silu_mul" and PARTS > 0 else PARTS,
    )  # fmt: skip
    if EPILOGUE == "silu_mul":
        up = finished(
            place + count, outputs + width, columns, rows, n, row_factor, bias,
            t, b_table, rank_table, active, factors, module, start1, start2, 0,
            SPLITS=1, HAS_BIAS=HAS_BIAS, PARTS=PARTS, SLOTS=SLOTS, RANK=RANK, MAX_ACTIVE=MAX_ACTIVE, ALIGNED=ALIGNED,
            SKIP=True, FROM=1, TO=PARTS,
        )  # fmt: skip
        result = result / (1.0 + tl.exp(-result)) * up
    out = columns[None, :].to(tl.int64) * width + outputs[:, None]
    mask = (inside < count)[:, None] & (columns < rows)[None, :]
    if EPILOGUE == "add":
        result += tl.load(residual + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + out, result.to(y.dtype.element_ty), mask=mask)


def dequantize(weight: TritonNf4, out: Tensor, start: int) -> None:
    """out [count, k], float16 or bfloat16: rows start … start + count − 1 of the weight. One launch."""
    count, k = out.shape
    assert k == weight.k, (out.shape, weight.n, weight.k)
    assert start + count <= weight.n, (start, count, weight.n)
    in_row = k // 64
    nested, code_map = (weight.nested, weight.map) if weight.double_quant else (weight.absmax, weight.absmax)
    nf4_dequant[(-(-count * in_row // _GROUPS),)](
        weight.words, weight.absmax, nested, code_map, out, start * in_row, count * in_row, GROUPS=_GROUPS,
        DOUBLE_QUANT=weight.double_quant, num_warps=_WARPS, num_stages=1,
    )  # fmt: skip


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
    """y = (x · row_factor) · Wᵀ + bias + LoRA, then the epilogue; `output_width` checks the operands. Any number of
    rows.

    Scratch: 32 MiB of decoded weights and [rows, slice] float32.
    """
    rows, k = x.shape
    width = output_width(x, row_factor, weight, y, bias, lora, epilogue, residual)
    halves = weight.n // width
    if rows == 0:
        return
    most = min(width, max(1, SLICE_WEIGHTS // (halves * k)))
    decoded = torch.empty(halves * most, k, dtype=torch.float16, device=x.device)
    nothing = row_factor
    for first in range(0, width, most):
        count = min(most, width - first)
        for half in range(halves):
            dequantize(weight, decoded[half * count : (half + 1) * count], half * width + first)
        sums = _multiply(x, decoded[: halves * count])
        nf4_dequant_finish[(-(-count // _FINISH_OUTPUTS), -(-rows // _FINISH_ROWS))](
            sums, y, row_factor, nothing if bias is None else bias, nothing if residual is None else residual, rows,
            weight.n, first, count, *lora_arguments(lora, nothing), *lora_starts(lora, weight.n),
            OUTPUTS=_FINISH_OUTPUTS, COLUMNS=_FINISH_ROWS, EPILOGUE=epilogue, HAS_BIAS=bias is not None,
            **lora_constants(lora), num_warps=_WARPS, num_stages=1, **NO_SPILLS,
        )  # fmt: skip


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """float32 [rows, n] of float16 [rows, k] and [n, k]. float16 sums would overflow, since rows are scaled up to
    2^12."""
    if x.is_cuda:
        return torch.mm(x, matrix.T, out_dtype=torch.float32)
    return x.float() @ matrix.float().T  # torch has a product with `out_dtype` for CUDA only
