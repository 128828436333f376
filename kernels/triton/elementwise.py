"""The small kernels between the products, in Triton: norm, SiLU · up, embedding, the largest logit.

Each is one launch; torch would need several. Sums are float32. A result that feeds an NF4 product can be asked for as
`ScaledRows`: float16 with one power of two per row, which keeps the range of bfloat16 and float32 activations, and more
digits than bfloat16 has. tests/kernels/triton/test_elementwise.py compares with float64 in Triton's interpreter;
`guanaco bench kernels` compiles them for every target; NEVER RUN on a GPU so far. Called by the `triton` provider.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# A row must fit in the registers of one program: 32 warps of 32 lanes with 32 elements each.
MAX_ROW = 32768
_WARP_ELEMENTS = 1024
_PLAIN_WARPS = 2  # for a kernel with 1,024 elements of a row: 16 per lane
# The largest element of a scaled row lies in [2^11, 2^12): eight products with NF4 levels of at most 1.3504, summed in
# float16, stay below 65,504, and an element that is 2^25 times smaller is still a normal number.
_TOP_EXPONENT = 11
_VOCAB_BLOCK = 2048  # logits of a row per program


@dataclass(frozen=True)
class ScaledRows:
    """float16 `rows` [t, n] times float32 `factors` [t], powers of two."""

    rows: Tensor
    factors: Tensor


# ---- kernels


@triton.jit
def _row_power(largest, TOP: tl.constexpr):
    """(2^e, 2^-e) such that `largest` · 2^-e lies in [2^TOP, 2^(TOP + 1)). For zero (1, 1). Never infinite or
    denormal."""
    bits = (largest.to(tl.int32, bitcast=True) & 0x7F800000) - (TOP << 23)
    bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
    bits = tl.where(largest == 0.0, 127 << 23, bits)
    return bits.to(tl.float32, bitcast=True), ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def _store_row(y, factors, row, column, inside, value, WIDTH: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr):
    if SCALED:
        power, inverse = _row_power(tl.max(tl.abs(value)), TOP)
        tl.store(factors + row, power)
        value = value * inverse
    tl.store(y + row * WIDTH + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_kernel(
    x, residual, weight, y, summed, factors, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One row: y = (x + residual) / rms · weight. The sum is first rounded to the activations' dtype, and stored."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(summed.dtype.element_ty)
        tl.store(summed + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    value = value * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    _store_row(y, factors, row, column, inside, value, WIDTH, SCALED, TOP)


@triton.jit
def silu_mul_kernel(
    gate, up, y, factors, gate_stride, up_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row: gate / (1 + e^-gate) · up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_row(y, factors, row, column, inside, g / (1.0 + tl.exp(-g)) * u, WIDTH, SCALED, TOP)


@triton.jit
def scale_rows_kernel(x, y, factors, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    _store_row(y, factors, row, column, inside, value, WIDTH, True, TOP)


@triton.jit
def embedding_kernel(ids, table, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(table + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * WIDTH + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def argmax_part_kernel(logits, values, indexes, vocab, parts, BLOCK: tl.constexpr):
    """The largest of BLOCK logits of a row, and its index; of equal ones the lowest index."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * vocab + column, mask=column < vocab, other=float("-inf"))
    largest, index = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * parts + part, largest)
    tl.store(indexes + row * parts + part, part * BLOCK + index)


@triton.jit
def argmax_kernel(values, indexes, tokens, parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(values + row * parts + part, mask=part < parts, other=float("-inf"))
    _, best = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens + row, tl.load(indexes + row * parts + best).to(tl.int64))


# ---- launches


def _row_block(width: int) -> tuple[int, int]:
    """(BLOCK, warps) for a kernel that holds a whole row of this width."""
    assert 0 < width <= MAX_ROW, f"rows of {width} elements do not fit in one program (at most {MAX_ROW})"
    block = triton.next_power_of_2(width)
    return block, min(32, max(1, block // _WARP_ELEMENTS))


def _result(shape: tuple[int, ...], like: Tensor, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """(rows, factors) to write to. If not `scaled`, factors is only a placeholder."""
    rows = torch.empty(shape, dtype=torch.float16 if scaled else like.dtype, device=like.device)
    factors = torch.empty(shape[0], dtype=torch.float32, device=like.device) if scaled else rows
    return rows, factors


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    t, width = x.shape
    assert x.is_contiguous()
    assert weight.shape == (width,)
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous())
    rows, factors = _result((t, width), x, scaled=scaled)
    summed = x if residual is None else torch.empty_like(x)
    block, warps = _row_block(width)
    if t:
        rms_norm_kernel[(t,)](
            x, x if residual is None else residual, weight, rows, summed, factors, eps,
            WIDTH=width, BLOCK=block, HAS_RESIDUAL=residual is not None, SCALED=scaled, TOP=_TOP_EXPONENT,
            num_warps=warps,
        )  # fmt: skip
    return rows, factors, summed


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual) in x's dtype, [t, hidden]; without a residual the second is x itself."""
    rows, _, summed = _norm(x, residual, weight, eps, scaled=False)
    return rows, summed


def rms_norm_scaled(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[ScaledRows, Tensor]:
    """`rms_norm`, with the norm as `ScaledRows`, which are rounded once, from float32 to float16."""
    rows, factors, summed = _norm(x, residual, weight, eps, scaled=True)
    return ScaledRows(rows, factors), summed


def _silu(gate: Tensor, up: Tensor, *, scaled: bool) -> tuple[Tensor, Tensor]:
    t, width = gate.shape
    assert gate.shape == up.shape
    assert gate.stride(1) == 1 == up.stride(1) or t * width == 0
    rows, factors = _result((t, width), gate, scaled=scaled)
    block, warps = _row_block(width) if scaled else (min(1024, triton.next_power_of_2(width)), _PLAIN_WARPS)
    if t:
        silu_mul_kernel[(t, triton.cdiv(width, block))](
            gate, up, rows, factors, gate.stride(0), up.stride(0),
            WIDTH=width, BLOCK=block, SCALED=scaled, TOP=_TOP_EXPONENT, num_warps=warps,
        )  # fmt: skip
    return rows, factors


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up, [t, intermediate]; both may be halves of one merged tensor (columns must be dense)."""
    return _silu(gate, up, scaled=False)[0]


def silu_mul_scaled(gate: Tensor, up: Tensor) -> ScaledRows:
    return ScaledRows(*_silu(gate, up, scaled=True))


def scale_rows(x: Tensor) -> ScaledRows:
    """x [t, n] as `ScaledRows`, for a product whose input doesn't come from a kernel of this file."""
    t, width = x.shape
    assert x.is_contiguous()
    rows, factors = _result((t, width), x, scaled=True)
    block, warps = _row_block(width)
    if t:
        scale_rows_kernel[(t,)](x, rows, factors, WIDTH=width, BLOCK=block, TOP=_TOP_EXPONENT, num_warps=warps)
    return ScaledRows(rows, factors)


def embedding(token_ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[t, hidden] in `dtype` of integer ids [t] and table [vocab, hidden]."""
    t, width = token_ids.shape[0], table.shape[1]
    assert table.is_contiguous()
    y = torch.empty((t, width), dtype=dtype, device=table.device)
    block = min(1024, triton.next_power_of_2(width))
    if t:
        embedding_kernel[(t, triton.cdiv(width, block))](
            token_ids, table, y, WIDTH=width, BLOCK=block, num_warps=_PLAIN_WARPS
        )
    return y


def argmax(logits: Tensor) -> Tensor:
    """int64 [r]: the index of the largest logit in each row of float32 logits [r, vocab]; of equal ones the lowest. Two
    launches.

    Rows may hold -infinity, but not NaN.
    """
    r, vocab = logits.shape
    assert logits.is_contiguous()
    tokens = torch.empty(r, dtype=torch.int64, device=logits.device)
    parts = triton.cdiv(vocab, _VOCAB_BLOCK)
    values = torch.empty((r, parts), dtype=torch.float32, device=logits.device)
    indexes = torch.empty((r, parts), dtype=torch.int32, device=logits.device)
    if r:
        argmax_part_kernel[(r, parts)](
            logits, values, indexes, vocab, parts, BLOCK=_VOCAB_BLOCK, num_warps=_PLAIN_WARPS
        )
        argmax_kernel[(r,)](values, indexes, tokens, parts, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return tokens
