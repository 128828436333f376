"""y = x · Wᵀ for few rows with NF4 weights in Triton, without tensor cores: 1, 2 or 4 rows per program.

Every lane handles whole groups of 64 weights: two 16-byte loads, levels looked up by byte permutes, two float16 chains
of four products for each pair of words, then float32 and one scale per group. The loop has no barrier, shuffle or
shared memory. The epilogue adds bias, LoRA and residual, or multiplies SiLU(gate) · up. Has never run on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from guanaco.kernels.triton.configs import NO_SPILLS
from guanaco.kernels.triton.products.lora import LoraStep, lora_arguments, lora_constants, lora_expand_tile, lora_starts
from guanaco.kernels.triton.products.operands import output_width
from guanaco.kernels.triton.products.pack import TABLE_WORDS, TritonNf4

MAX_ROWS = 8  # in passes of four rows; from five rows on nf4_dot is better on GPUs with tensor cores
_GROUP = 64
_ENOUGH_WARPS = 1024  # a large GPU has some 130 multiprocessors and needs eight warps on each

# A word of eight codes → four registers of two float16. The first words of the tables are xored with a zero that ptxas
# does not know to be zero (no lane has 32 lanes below it). So they stay in registers; constants would be moved there
# again before every look-up.
_LOW, _LOW_4, _LOW_8, _LOW_12, _HIGH, _HIGH_4, _HIGH_8, _HIGH_12 = (f"{word:#010x}" for word in TABLE_WORDS)
DECODE = tl.constexpr(f"""{{
.reg .b32 z, l, m, h, i, q, x, y, a, b, c, d;
mov.u32 z, %lanemask_lt; shr.u32 z, z, 31;
xor.b32 l, z, {_LOW}; xor.b32 m, z, {_LOW_8}; xor.b32 h, z, {_HIGH}; xor.b32 i, z, {_HIGH_8};
shr.u32 q, $4, 16; xor.b32 x, $4, 0x88888888; xor.b32 y, q, 0x8888;
prmt.b32 a, l, {_LOW_4}, $4; prmt.b32 b, m, {_LOW_12}, x; prmt.b32 c, h, {_HIGH_4}, $4; prmt.b32 d, i, {_HIGH_12}, x;
xor.b32 a, a, b; xor.b32 c, c, d; prmt.b32 $0, a, c, 0x5140; prmt.b32 $1, a, c, 0x7362;
prmt.b32 a, l, {_LOW_4}, q; prmt.b32 b, m, {_LOW_12}, y; prmt.b32 c, h, {_HIGH_4}, q; prmt.b32 d, i, {_HIGH_12}, y;
xor.b32 a, a, b; xor.b32 c, c, d; prmt.b32 $2, a, c, 0x5140; prmt.b32 $3, a, c, 0x7362;
}}""")
DECODE_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r")

# The products of two words with two times eight activations: two chains and one sum in float16, then float32. With |x|
# < 4096 a partial sum is at most 8 · 4096 · 1.3504, which float16 can hold.
_PRODUCT = tl.constexpr("""{
.reg .b32 t, u; .reg .b16 a, b; .reg .f32 f, g;
mul.rn.f16x2 t, $1, $9; fma.rn.f16x2 t, $2, $10, t; fma.rn.f16x2 t, $3, $11, t; fma.rn.f16x2 t, $4, $12, t;
mul.rn.f16x2 u, $5, $13; fma.rn.f16x2 u, $6, $14, u; fma.rn.f16x2 u, $7, $15, u; fma.rn.f16x2 u, $8, $16, u;
add.rn.f16x2 t, t, u; mov.b32 {a, b}, t; cvt.f32.f16 f, a; cvt.f32.f16 g, b; add.f32 $0, f, g;
}""")
_PRODUCT_CONSTRAINTS = tl.constexpr("=f" + 16 * ",r")

# Loads in asm keep the layout of the pointers. Triton would choose a layout for each load and exchange data between
# lanes.
_LOAD_X = tl.constexpr("ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD_X_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,l")
_LOAD_CODE = tl.constexpr("ld.global.nc.u8 $0, [$1];")
_LOAD_CODE_CONSTRAINTS = tl.constexpr("=r,l")
_LOAD_SCALE = tl.constexpr("ld.global.nc.f32 $0, [$1];")
_LOAD_SCALE_CONSTRAINTS = tl.constexpr("=f,l")
# map[code] · nested[group / 256, 0] + nested[group / 256, 1]; group is its number in the whole matrix.
_DECODE_SCALE = tl.constexpr("""{
.reg .b32 n; .reg .b64 p, q; .reg .f32 v, s, o;
mad.wide.u32 p, $1, 4, $4; ld.global.nc.f32 v, [p];
shr.u32 n, $2, 8; mad.wide.u32 q, n, 8, $3; ld.global.nc.v2.f32 {s, o}, [q]; fma.rn.f32 $0, v, s, o;
}""")
_DECODE_SCALE_CONSTRAINTS = tl.constexpr("=f,r,r,l,l")


@triton.jit
def _decode(words):
    return tl.inline_asm_elementwise(
        DECODE, DECODE_CONSTRAINTS, [words], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _load_x(pointers):
    return tl.inline_asm_elementwise(
        _LOAD_X, _LOAD_X_CONSTRAINTS, [pointers], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _stored_scales(absmax, rows, start, K: tl.constexpr, GROUPS: tl.constexpr, DOUBLE_QUANT: tl.constexpr):
    """[rows, GROUPS] scales as stored (int32 codes or float32), from group `start` of each row on. Beyond the end: the
    last one."""
    groups = tl.minimum(start + tl.arange(0, GROUPS), K // 64 - 1)
    place = (absmax + groups)[None, :] + rows[:, None] * (K // 64)
    if DOUBLE_QUANT:
        stored = tl.inline_asm_elementwise(_LOAD_CODE, _LOAD_CODE_CONSTRAINTS, [place], tl.int32, is_pure=True, pack=1)
    else:
        stored = tl.inline_asm_elementwise(
            _LOAD_SCALE, _LOAD_SCALE_CONSTRAINTS, [place], tl.float32, is_pure=True, pack=1
        )
    return stored


@triton.jit
def _dot(first, second, x, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """float32 [BLOCK_N, GROUPS] of decoded words (the groups' first and second halves) and x, pointers [4 · GROUPS]."""
    w0, w1, w2, w3 = first
    v0, v1, v2, v3 = second
    x0, x1, x2, x3 = _load_x(x)
    z0, z1, z2, z3 = _load_x(x + 32)
    operands = [
        w0, w1, w2, w3, v0, v1, v2, v3, x0[None, :], x1[None, :], x2[None, :], x3[None, :], z0[None, :], z1[None, :],
        z2[None, :], z3[None, :],
    ]  # fmt: skip
    products = tl.inline_asm_elementwise(_PRODUCT, _PRODUCT_CONSTRAINTS, operands, tl.float32, is_pure=True, pack=1)
    return tl.sum(tl.reshape(products, (BLOCK_N, GROUPS, 4)), 2)


@triton.jit
def _turn(
    s0, s1, s2, s3, start, stored, first_group, rows, x0, x1, x2, x3, words, nested, code_map,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Every row's sums [BLOCK_N, GROUPS] after GROUPS more groups, from group `start` of each row on.

    stored: these groups' scales, as stored. first_group: the number of row 0's first group in the whole matrix.
    """
    groups = start + tl.arange(0, GROUPS)
    columns = start + tl.arange(0, 4 * GROUPS) // 4
    inside = groups < K // 64
    if TAIL:  # beyond the end: read the last group again, with a scale of zero
        groups = tl.minimum(groups, K // 64 - 1)
        columns = tl.minimum(columns, K // 64 - 1)
    columns = columns * 8 + tl.arange(0, 4 * GROUPS) % 4
    scale = stored
    if DOUBLE_QUANT:
        flat = (first_group + groups)[None, :] + rows[:, None] * (K // 64)
        scale = tl.inline_asm_elementwise(
            _DECODE_SCALE, _DECODE_SCALE_CONSTRAINTS, [stored, flat, nested, code_map], tl.float32, is_pure=True, pack=1
        )
    if TAIL:
        scale = tl.where(inside[None, :], scale, 0.0)
    place = (words + columns)[None, :] + rows[:, None] * (K // 8)
    first = _decode(tl.load(place))
    second = _decode(tl.load(place + 4))
    s0 += scale * _dot(first, second, x0 + columns * 8, BLOCK_N, GROUPS)
    if ROWS > 1:
        s1 += scale * _dot(first, second, x1 + columns * 8, BLOCK_N, GROUPS)
    if ROWS > 2:
        s2 += scale * _dot(first, second, x2 + columns * 8, BLOCK_N, GROUPS)
        s3 += scale * _dot(first, second, x3 + columns * 8, BLOCK_N, GROUPS)
    return s0, s1, s2, s3


@triton.jit
def _sums(s0, s1, s2, s3, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """[BLOCK_N, ROWS]: the lanes' sums, added up."""
    if ROWS == 1:
        sums = tl.sum(s0, 1)[:, None]
    elif ROWS == 2:
        sums = tl.join(tl.sum(s0, 1), tl.sum(s1, 1))
    else:
        pairs = tl.join(tl.join(tl.sum(s0, 1), tl.sum(s2, 1)), tl.join(tl.sum(s1, 1), tl.sum(s3, 1)))
        sums = tl.reshape(pairs, (BLOCK_N, 4))
    return sums


@triton.jit(do_not_specialize=["rows", "module"])
def nf4_simt(
    x, row_factor, words, absmax, nested, code_map, y, rows, bias, residual,
    t, b_table, rank_table, active, factors, module,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
    SLOTS: tl.constexpr, RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, START1: tl.constexpr, START2: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of ROWS rows. Grid: (tiles of outputs, passes over rows).

    silu_mul: half of the tile's weight rows belong to the gate matrix and half to up, so that one program has both.
    PARTS 0: no LoRA, and its arguments are not read. START1, START2: first outputs of the second and third part.
    """
    PAIRED: tl.constexpr = EPILOGUE == "silu_mul"
    SPAN: tl.constexpr = BLOCK_N // 2 if PAIRED else BLOCK_N
    LAST: tl.constexpr = N // 2 if PAIRED else N
    STEPS: tl.constexpr = K // 64 // GROUPS
    index = tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * SPAN
    output = first + index % SPAN
    # Row numbers are relative to the tile's first row: that makes them constants, which are free in an address.
    tile_row = index % SPAN if LAST % SPAN == 0 else tl.minimum(index % SPAN, LAST - 1 - first)
    tile_row += index // SPAN * LAST
    first_group = first * (K // 64)
    words += first.to(tl.int64) * (K // 8)
    absmax += first.to(tl.int64) * (K // 64)
    row = tl.program_id(1) * ROWS
    # Three rows run as four: the last row twice.
    x0 = x + row * K
    x1 = x + tl.minimum(row + 1, rows - 1) * K
    x2 = x + tl.minimum(row + 2, rows - 1) * K
    x3 = x + tl.minimum(row + 3, rows - 1) * K
    s0 = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    s1, s2, s3 = s0, s0, s0
    stored = _stored_scales(absmax, tile_row, 0, K, GROUPS, DOUBLE_QUANT)
    for step in range(STEPS):
        # Loaded one turn ahead: a scale takes two dependent loads, and nothing else could start in the meantime.
        following = _stored_scales(absmax, tile_row, (step + 1) * GROUPS, K, GROUPS, DOUBLE_QUANT)
        s0, s1, s2, s3 = _turn(
            s0, s1, s2, s3, step * GROUPS, stored, first_group, tile_row, x0, x1, x2, x3, words, nested, code_map,
            K, ROWS, BLOCK_N, GROUPS, DOUBLE_QUANT, False,
        )  # fmt: skip
        stored = following
    if STEPS * GROUPS < K // 64:
        s0, s1, s2, s3 = _turn(
            s0, s1, s2, s3, STEPS * GROUPS, stored, first_group, tile_row, x0, x1, x2, x3, words, nested, code_map,
            K, ROWS, BLOCK_N, GROUPS, DOUBLE_QUANT, True,
        )  # fmt: skip
    acc = _sums(s0, s1, s2, s3, BLOCK_N, ROWS)
    columns = row + tl.arange(0, ROWS)
    # The factor is a power of two, so fusing this product with a later sum changes nothing.
    acc *= tl.load(row_factor + columns, mask=columns < rows, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + first + tile_row)[:, None]
    if PARTS > 0:
        last = tl.minimum(first + SPAN, LAST) - 1 + (LAST if PAIRED else 0)
        acc = lora_expand_tile(
            acc, first + tile_row, output < LAST, first, last, columns, rows,
            t, b_table, rank_table, active, factors, module, N, START1, START2, SLOTS, PARTS, RANK, MAX_ACTIVE, ALIGNED,
            False,
        )  # fmt: skip
    if PAIRED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, SPAN, ROWS)), (1, 2, 0)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
        output = first + tl.arange(0, SPAN)
    place = columns[None, :] * LAST + output[:, None]
    mask = (output < LAST)[:, None] & (columns < rows)[None, :]
    if EPILOGUE == "add":
        acc += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=mask)


# ---- launching


def _config(n: int, k: int, rows: int) -> dict[str, int]:
    """Tile sizes and warps. A warp handles 32 groups per loop turn. Warps of a program share a row until the GPU has
    enough.

    Eight outputs of two rows would spill on sm_100.
    """
    batch = 1 if rows == 1 else 2 if rows == 2 else 4
    block_n = 8 if batch == 1 else 4
    warps = 1
    while warps < 4 and n // block_n * warps < _ENOUGH_WARPS and 64 * warps <= k // _GROUP:
        warps *= 2
    return {"ROWS": batch, "BLOCK_N": block_n, "GROUPS": 32 * warps, "num_warps": warps}


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
    """y = (x · row_factor) · Wᵀ + bias + LoRA, then the epilogue; `output_width` checks the operands. Up to MAX_ROWS
    rows."""
    rows = x.shape[0]
    outputs = output_width(x, row_factor, weight, y, bias, lora, epilogue, residual)
    assert rows <= MAX_ROWS, rows
    assert x.data_ptr() % 16 == 0, "x is loaded 16 bytes at a time"
    if rows == 0:
        return
    c = _config(weight.n, weight.k, rows)
    start1, start2 = lora_starts(lora, weight.n)
    span = c["BLOCK_N"] // 2 if epilogue == "silu_mul" else c["BLOCK_N"]
    # Absent operands are not read, but the kernel needs some tensor for each.
    nested, code_map = (weight.absmax if t is None else t for t in (weight.nested, weight.map))
    nf4_simt[(-(-outputs // span), -(-rows // c["ROWS"]))](
        x, row_factor, weight.words, weight.absmax, nested, code_map, y, rows, row_factor if bias is None else bias,
        y if residual is None else residual, *lora_arguments(lora, row_factor),
        N=weight.n, K=weight.k, DOUBLE_QUANT=weight.double_quant, HAS_BIAS=bias is not None, EPILOGUE=epilogue,
        START1=start1, START2=start2, **lora_constants(lora), **c, **NO_SPILLS,
    )  # fmt: skip
