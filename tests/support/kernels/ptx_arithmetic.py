"""The arithmetic of PTX instructions on raw bits in numpy: shifts, look-ups, floats and conversions.

Knows no instruction texts and no registers. Used by `ptx_interpreter`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[Any]

UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
INT = {16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


class PtxError(Exception):
    """The asm text does something that the evaluator doesn't know, or that real hardware would not do as meant."""


def prmt(a: Bits, b: Bits, selector: Bits) -> Bits:
    """Four bytes out of the eight of {b, a}; a selector's top bit spreads the byte's sign instead."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte >= 128, np.uint32(0xFF), np.uint32(0))
        chosen = np.where(nibble >= 8, sign, byte.astype(np.uint32))
        out |= chosen << np.uint32(8 * i)
    return out


def lop3(a: Bits, b: Bits, c: Bits, table: int) -> Bits:
    out = np.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def shift(bits: Bits, amount: Bits, left: bool, signed: bool) -> Bits:
    """PTX clamps the amount: everything is shifted out from the register's width on."""
    width = bits.itemsize * 8
    clamped = np.minimum(amount, np.uint32(width - 1)).astype(bits.dtype)
    if signed and not left:
        return (bits.view(INT[width]) >> clamped.astype(INT[width])).view(bits.dtype)
    shifted = bits << clamped if left else bits >> clamped
    return np.where(amount >= width, bits.dtype.type(0), shifted)


def halves(bits: Bits) -> tuple[Bits, Bits]:
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def pack(low: Bits, high: Bits) -> Bits:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def to_double(bits: Bits, kind: str) -> npt.NDArray[np.float64]:
    """The values of f16, bf16, f32 or f64 bits."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(FLOAT[int(kind[1:])]).astype(np.float64)


def from_double(values: npt.NDArray[np.float64], kind: str) -> Bits:
    """Nearest even, once: float64 to the bits of f16, bf16, f32 or f64."""
    if kind != "bf16":
        width = int(kind[1:])
        return values.astype(FLOAT[width]).view(UINT[width])
    # Rounded to odd in float32 first, so that the second rounding sees which side of a tie the value was on.
    single = np.atleast_1d(values.astype(np.float32))
    exact = np.atleast_1d(values)
    bits = single.view(np.uint32).copy()
    bits -= (np.abs(single.astype(np.float64)) > np.abs(exact)).astype(np.uint32)
    bits |= (bits.view(np.float32).astype(np.float64) != exact).astype(np.uint32)
    bits = np.where(np.isnan(exact), np.uint32(0x7FFF0000), bits)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)
    return rounded.astype(np.uint16).reshape(values.shape)


def fma_exact(a: Bits, b: Bits, c: Bits, kind: str) -> Bits:
    """a·b + c with one rounding: the product of 24-bit numbers is exact in float64, the sum is rounded to odd."""
    product = to_double(a, kind) * to_double(b, kind)
    addend = to_double(c, kind)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (np.asarray(total).view(np.uint64) & np.uint64(1)) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    total = np.where(np.isfinite(total) & (error != 0) & even, odd, total)
    return from_double(total, kind)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
}


def float_op(name: str, kind: str, operands: list[Bits]) -> Bits:
    if kind.endswith("x2"):
        split = [halves(o) for o in operands]
        return pack(float_op(name, kind[:-2], [h[0] for h in split]), float_op(name, kind[:-2], [h[1] for h in split]))
    if name == "fma":
        return fma_exact(operands[0], operands[1], operands[2], kind)
    width = 16 if kind == "bf16" else int(kind[1:])
    sign = UINT[width](1 << (width - 1))
    if name == "neg":
        return operands[0] ^ sign
    if name == "abs":
        return operands[0] & ~sign
    if kind == "f64":
        raise PtxError("f64 arithmetic is not evaluated")
    # 53 bits are more than twice 24 and two: rounding a single sum or product twice is the same as once.
    return from_double(ARITHMETIC[name](*(to_double(o, kind) for o in operands)), kind)


def integer_op(name: str, width: int, signed: bool, operands: list[Bits]) -> Bits:
    values = [o.view(INT[width]) for o in operands] if signed else operands
    if name in ("mad", "fma"):
        return (values[0] * values[1] + values[2]).view(UINT[width])
    if name == "neg":
        return (np.uint64(0) - operands[0].astype(np.uint64)).astype(UINT[width])
    return np.asarray(ARITHMETIC[name](*values)).view(UINT[width])


def convert(parts: list[str], operands: list[Bits]) -> Bits:
    """cvt[.rn|.rz|…].to.from, and the packing form cvt.rn.f16x2.f32 d, high, low."""
    to, source = parts[-2], parts[-1]
    rounding = [p for p in parts[1:-2] if p not in ("rn", "rni", "ftz")]
    if rounding:
        raise PtxError(f"cvt with .{rounding[0]} is not evaluated")
    if to in ("f16x2", "bf16x2"):
        high, low = (from_double(to_double(o, source), to[:-2]) for o in operands)
        return pack(low, high)
    if source[0] in "su":
        width = int(source[1:])
        values = (operands[0].view(INT[width]) if source[0] == "s" else operands[0]).astype(np.float64)
        if to[0] in "su":
            wide = operands[0].view(INT[width]) if source[0] == "s" else operands[0]
            return wide.astype(INT[int(to[1:])] if source[0] == "s" else UINT[int(to[1:])]).view(UINT[int(to[1:])])
        return from_double(values, to)
    if to[0] in "su":
        width = int(to[1:])
        limits = np.iinfo(INT[width] if to[0] == "s" else UINT[width])
        values = np.clip(np.nan_to_num(np.rint(to_double(operands[0], source))), limits.min, limits.max)
        return values.astype(INT[width] if to[0] == "s" else UINT[width]).view(UINT[width])
    return from_double(to_double(operands[0], source), to)


def source_width(kind: str) -> int:
    if kind.endswith("x2"):
        return 32
    return 16 if kind == "bf16" else int(kind[1:])


def bit_field(values: list[Bits], kind: str) -> Bits:
    if kind == "s32":
        raise PtxError("bfe.s32 is not evaluated")
    start, length = values[1] & np.uint32(0xFF), values[2] & np.uint32(0xFF)
    mask = np.where(length >= 32, np.uint64(0xFFFFFFFF), (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
    return (shift(values[0], start, left=False, signed=False).astype(np.uint64) & mask).astype(np.uint32)
