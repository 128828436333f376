"""The evaluator of inline PTX against slow, plain models; and the decode of NF4 over all patterns of four nibbles."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.kernels.nf4_proof import prove_decode
from support.kernels.ptx_arithmetic import PtxError, from_double, to_double
from support.kernels.ptx_interpreter import evaluate

_WORD = st.integers(0, 2**32 - 1)
_HALF = st.integers(0, 2**16 - 1)

# The byte-permute look-up, with its tables for gained float16 and for bfloat16.
_TEXT = """{{
.reg .b32 x0, x1, q1, a, b, c, d;
shr.u32 q1, $4, 16;  xor.b32 x0, $4, 0x88888888;  xor.b32 x1, q1, 0x8888;  // the other table's selectors
prmt.b32 a, {0}, {1}, $4;  prmt.b32 b, {2}, {3}, x0;  prmt.b32 c, {4}, {5}, $4;  prmt.b32 d, {6}, {7}, x0;
xor.b32 a, a, b;  xor.b32 c, c, d;  prmt.b32 $0, a, c, 0x5140;  prmt.b32 $1, a, c, 0x7362;
prmt.b32 a, {0}, {1}, q1;  prmt.b32 b, {2}, {3}, x1;  prmt.b32 c, {4}, {5}, q1;  prmt.b32 d, {6}, {7}, x1;
xor.b32 a, a, b;  xor.b32 c, c, d;  prmt.b32 $2, a, c, 0x5140;  prmt.b32 $3, a, c, 0x7362;
}}"""
_CONSTRAINTS = "=&r,=&r,=&r,=&r,r"
_F16 = ["0xac854467", "0x4d51f4e1", "0x21030025", "0x6714303c", "0xb9bbb8bd", "0x3735322e", "0x504c7f49", "0x3d3a3b38"]
_BF16 = ["0x0632ca80", "0x7c25ada3", "0x003d456d", "0x39107f1d", "0xbfbfbebf", "0x3e3e3e3d", "0x7f414241", "0x3f3f3f3e"]
_F16_CODES = (0, 2, 3, 1, 8, 10, 11, 9, 4, 5, 6, 7, 12, 14, 13, 15)
_BF16_CODES = (0, 2, 3, 1, 8, 10, 9, 11, 4, 6, 7, 5, 12, 14, 15, 13)


def _one(asm: str, constraints: str, *words: int, width: int = 32) -> int:
    dtype = {16: np.uint16, 32: np.uint32}[width]
    return int(evaluate(asm, constraints, [np.array([w], dtype) for w in words])[0][0])


@given(_WORD, _WORD, _WORD)
def test_prmt(a: int, b: int, selector: int) -> None:
    data = (b << 32 | a).to_bytes(8, "little")
    expected = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        expected |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    assert _one("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", a, b, selector) == expected


@given(_WORD, _WORD, _WORD, st.integers(0, 255))
def test_lop3(a: int, b: int, c: int, table: int) -> None:
    expected = sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))
    assert _one(f"lop3.b32 $0, $1, $2, $3, {table};", "=r,r,r,r", a, b, c) == expected


@given(_WORD, st.integers(0, 40))
def test_shifts_clamp(word: int, amount: int) -> None:
    signed = word - (1 << 32) if word >> 31 else word
    assert _one("shr.u32 $0, $1, $2;", "=r,r,r", word, amount) == word >> amount
    assert _one("shl.b32 $0, $1, $2;", "=r,r,r", word, amount) == word << amount & 0xFFFFFFFF
    assert _one("shr.s32 $0, $1, $2;", "=r,r,r", word, amount) == signed >> amount & 0xFFFFFFFF


def _value(bits: int) -> float:
    return float(np.array([bits], np.uint16).view(np.float16)[0])


@given(_HALF, _HALF, _HALF)
def test_fma_rounds_once(a: int, b: int, c: int) -> None:
    """Against exact fractions: no float16 is nearer to a·b + c than the one that came out, and ties are even."""
    x, y, z = _value(a), _value(b), _value(c)
    packed = [v | v << 16 for v in (a, b, c)]
    found = _one("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", *packed)
    assert found & 0xFFFF == found >> 16 or np.isnan(_value(found & 0xFFFF))
    if not np.isfinite([x, y, z]).all():
        return
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    result = _value(found & 0xFFFF)
    if not np.isfinite(result):
        assert abs(exact) >= 65520
        return
    distance = abs(exact - Fraction(result))
    for neighbour in (np.nextafter(np.float16(result), np.float16(s)) for s in (np.inf, -np.inf)):
        if np.isfinite(neighbour):
            other = abs(exact - Fraction(float(neighbour)))
            assert distance < other or (distance == other and found & 1 == 0)


def test_the_lanes_below() -> None:
    masks = evaluate("mov.u32 $0, %lanemask_lt;", "=r,r", [np.zeros(64, np.uint32)])[0]
    assert masks.tolist() == [(1 << lane) - 1 for lane in range(32)] * 2


@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_is_rounded_as_torch_does(value: float) -> None:
    bits = from_double(np.array([value], np.float64), "bf16")
    expected = torch.tensor([value], dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert bits[0] == expected[0]
    assert to_double(bits, "bf16")[0] == float(torch.tensor([value]).bfloat16()[0])


@given(_WORD)
def test_a_word_comes_apart_and_together(word: int) -> None:
    asm = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; mov.b32 $0, {hi, lo}; }"
    assert _one(asm, "=r,r", word) == (word >> 16 | word << 16) & 0xFFFFFFFF


def test_conversions() -> None:
    number = int(np.float32(1.2345).view(np.uint32))
    half = int(np.float16(np.float32(1.2345)).view(np.uint16))
    assert _one("{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h; }", "=f,f", number) == int(
        np.float32(np.float16(1.2345)).view(np.uint32)
    )
    # the packing form puts its first source into the upper half
    assert _one("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", number, 0) == half << 16
    assert _one("cvt.rn.f32.s32 $0, $1;", "=f,r", 0xFFFFFFFF) == int(np.float32(-1).view(np.uint32))


@pytest.mark.parametrize(
    ("asm", "constraints", "complaint"),
    [
        ("popc.b32 $0, $1;", "=r,r", "not evaluated"),
        ("@p mov.b32 $0, $1;", "=r,r", "predicated"),
        ("add.sat.s32 $0, $1, $1;", "=r,r", "not evaluated"),
        ("mov.b32 $0, t;", "=r,r", "neither a register nor a number"),
        ("{ .reg .b32 t; mov.b32 $0, t; }", "=r,r", "before anything was written"),
        ("mov.b16 $0, $1;", "=r,r", "32 bits where 16 are read"),
        ("mov.b32 $0, $1; add.u32 $0, $0, $1;", "=r,r", "needs '=&'"),
    ],
)
def test_what_is_not_known_or_not_safe_raises(asm: str, constraints: str, complaint: str) -> None:
    with pytest.raises(PtxError, match=complaint):
        _one(asm, constraints, 1)


def test_the_decode_of_all_patterns() -> None:
    prove_decode(_TEXT.format(*_F16), _CONSTRAINTS, code_of_level=_F16_CODES, gain=1.350341796875, kind="f16")
    prove_decode(_TEXT.format(*_BF16), _CONSTRAINTS, code_of_level=_BF16_CODES, gain=1.0, kind="bf16")


@pytest.mark.parametrize("word", range(8))
def test_one_wrong_bit_in_a_table_is_found(word: int) -> None:
    tables = list(_F16)
    tables[word] = hex(int(tables[word], 16) ^ 1 << 9)
    with pytest.raises(AssertionError, match="instead of"):
        prove_decode(_TEXT.format(*tables), _CONSTRAINTS, code_of_level=_F16_CODES, gain=1.350341796875, kind="f16")


def test_a_wrong_order_of_the_codes_is_found() -> None:
    with pytest.raises(AssertionError, match="instead of"):
        prove_decode(_TEXT.format(*_BF16), _CONSTRAINTS, code_of_level=_F16_CODES, gain=1.0, kind="bf16")


# ---- under Triton's interpreter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _product(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(z + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


@triton.jit
def _sum_of_two(x, y, z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z + i, (tl.load(x + i) + tl.load(y + i)).to(tl.float32))


@triton.jit
def _swap(x, y, PACK: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    text: tl.constexpr = "prmt.b32 $0, $1, 0, 0x1032;"
    tl.store(y + i, tl.inline_asm_elementwise(text, "=r,r", [tl.load(x + i)], tl.int32, is_pure=True, pack=PACK))


@triton.jit
def _pairs(x, y):
    i = tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :]
    text: tl.constexpr = "prmt.b32 $0, $1, $2, 0x1054;"
    tl.store(y + i, tl.inline_asm_elementwise(text, "=r,r,r", [tl.load(x + i)], tl.int16, is_pure=True, pack=2))


def test_pack_2_takes_neighbours_of_the_last_axis() -> None:
    """The lower halves of both, the second one's first."""
    x = torch.tensor([0x90001, 0x90002, 0x90003, 0x90004, 0x90005, 0x90006, 0x90007, 0x90008], dtype=torch.int32)
    y = torch.zeros(8, dtype=torch.int16)
    _pairs[(1,)](x, y)
    assert y.tolist() == [2, 1, 4, 3, 6, 5, 8, 7]


def test_products_of_bfloat16_are_right() -> None:
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    z = torch.full((16, 16), float("nan"))
    _product[(1,)](x, y, z, 16)
    torch.testing.assert_close(z, x.float() @ y.float())


def test_arithmetic_on_the_raw_bits_of_bfloat16_is_refused() -> None:
    x = torch.randn(16).bfloat16()
    with pytest.raises(Exception, match="cast to float32 first"):
        _sum_of_two[(1,)](x, x, torch.zeros(16), 16)


def test_inline_asm_runs_inside_a_kernel() -> None:
    x = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)
    y = torch.zeros_like(x)
    _swap[(1,)](x, y, 1, 32)
    assert torch.equal(y.view(torch.int16).view(-1, 2), x.view(torch.int16).view(-1, 2).flip(1))
    with pytest.raises(Exception, match="pack=4"):
        _swap[(1,)](x, y, 4, 32)


@triton.jit
def _convert(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def _converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(len(x), dtype=dtype)
    _convert[(1,)](x, y, len(x))
    return y


def test_conversions_round_to_the_nearest() -> None:
    """All 65,536 upper halves of a float32, with lower halves below, on and above the middle, against torch."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper << 16 | lower).to(torch.int32).view(torch.float32)
        torch.testing.assert_close(_converted(x, torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True)
        saturated = x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        found = _converted(x, torch.float8_e4m3fn).float()
        torch.testing.assert_close(found, saturated, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_conversions_from_eight_bits_are_exact(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    for x in (codes.view(torch.float8_e4m3fn), codes.view(torch.int8)):
        torch.testing.assert_close(_converted(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)
