"""The product for few rows in Triton's interpreter, its own asm included, against float64 of the stored weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.kernels.lora_cases import make_lora
from support.kernels.nf4_proof import prove_decode
from support.kernels.tolerances import TRITON_NF4_RELATIVE_L2, relative_l2

pytest.importorskip("triton")

from guanaco.kernels import nf4
from guanaco.kernels.triton.products import nf4_simt
from guanaco.kernels.triton.products.lora import shrink
from guanaco.kernels.triton.products.pack import CODE_OF_LEVEL, GAIN, TritonNf4, merge, pack_nf4

pytestmark = pytest.mark.usefixtures("nan_poison")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _walled(x: Tensor) -> Tensor:
    """The same values with NaN before and behind, at a multiple of 16 bytes."""
    memory = torch.full((x.numel() + 128,), float("nan"), dtype=x.dtype)
    start = 64 + (-memory.data_ptr() // x.element_size()) % 8
    view = memory[start : start + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def _inputs(rows: int, k: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x float16 with outliers, row factors, and their product in float64."""
    x = _randn(rows, k, seed=seed)
    x = _walled((x * torch.where(_randn(rows, k, seed=seed + 1) > 2.5, 60.0, 1.0)).half())
    factor = torch.exp2(torch.arange(rows).float() % 3 - 1)
    return x, factor, x.double() * factor.double()[:, None]


def _length(weight: Tensor, x: Tensor, rows: int) -> float:
    """What the length of the result ordinarily is, without luck or cancellation."""
    return float((weight.double().square().sum(0) @ x.square().sum(0)) ** 0.5)


def _check(n: int, k: int, rows: int, *, double_quant: bool = True, seed: int = 0) -> None:
    weight = nf4.quantize(_randn(n, k, seed=seed) * 0.1, double_quant=double_quant)
    x, factor, values = _inputs(rows, k, seed + 1)
    y = torch.empty(rows, n)
    nf4_simt.product(x, factor, pack_nf4(weight), y)
    dense = weight.dequantize()
    assert relative_l2(y, values @ dense.double().T, _length(dense, values, rows)) < TRITON_NF4_RELATIVE_L2


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("shape", [(13, 192), (24, 2112), (5, 4096)])
def test_odd_sizes(shape: tuple[int, int], rows: int) -> None:
    """Outputs that are no multiple of the tile; one turn, no whole turn, and a whole one with a tail."""
    _check(*shape, rows)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 24), groups=st.integers(1, 70), rows=st.integers(1, 8), double=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
def test_any_shape(n: int, groups: int, rows: int, double: bool, seed: int) -> None:
    _check(n, 64 * groups, rows, double_quant=double, seed=seed)


@pytest.mark.parametrize("warps", [1, 2, 4])
def test_every_number_of_warps(warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_simt, "_ENOUGH_WARPS", warps)
    _check(8, 64 * 32 * 4 + 64, 1)


def test_accuracy_of_long_rows() -> None:
    """Measured: 3.9e-4 to 4.1e-4; bitsandbytes' kernel has 2.7e-3 by a simulation of its roundings."""
    weight = nf4.quantize(_randn(64, 4096))
    x = _walled(_randn(4, 4096, seed=3).bfloat16().half())
    y = torch.empty(4, 64)
    nf4_simt.product(x, torch.ones(4), pack_nf4(weight), y)
    assert relative_l2(y, x.double() @ weight.dequantize().double().T) < 5e-4


def test_the_largest_activations_do_not_overflow() -> None:
    weight = nf4.quantize(torch.ones(8, 256))
    x = _walled(torch.full((1, 256), 4095.0).half())
    y = torch.empty(1, 8)
    nf4_simt.product(x, torch.ones(1), pack_nf4(weight), y)
    assert torch.allclose(y, x.float().sum().expand(1, 8), rtol=5e-4)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    weight = pack_nf4(nf4.quantize(_randn(16, 320)))
    x, factor, _ = _inputs(8, 320)
    rows = []
    for count in (1, 2, 3, 4, 8):
        y = torch.empty(count, 16)
        nf4_simt.product(x[:count], factor[:count], weight, y)
        rows.append(y[0])
    assert all(torch.equal(r, rows[0]) for r in rows)


def test_no_rows_at_all() -> None:
    weight = pack_nf4(nf4.quantize(_randn(8, 64)))
    nf4_simt.product(torch.empty(0, 64, dtype=torch.float16), torch.empty(0), weight, torch.empty(0, 8))


# ---- epilogues


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_bias_and_residual_in_place(rows: int, dtype: torch.dtype) -> None:
    weight = nf4.quantize(_randn(21, 192))
    x, factor, values = _inputs(rows, 192)
    bias, residual = _randn(21, seed=7), _randn(rows, 21, seed=8).to(dtype)
    y = residual.clone()
    nf4_simt.product(x, factor, pack_nf4(weight), y, bias=bias, epilogue="add", residual=y)
    expected = values @ weight.dequantize().double().T + bias.double() + residual.double()
    allowed = TRITON_NF4_RELATIVE_L2 if dtype == torch.float32 else 4e-3
    assert relative_l2(y.float(), expected) < allowed


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_silu_mul(rows: int) -> None:
    """11 outputs: the last tile has gate and up rows that are not there."""
    parts = [nf4.quantize(_randn(11, 192, seed=s) * 0.05) for s in (1, 2)]
    x, factor, values = _inputs(rows, 192)
    y = torch.empty(rows, 11)
    nf4_simt.product(x, factor, merge([pack_nf4(p) for p in parts]), y, epilogue="silu_mul")
    gate, up = (values @ p.dequantize().double().T for p in parts)
    assert relative_l2(y, torch.nn.functional.silu(gate) * up) < 2 * TRITON_NF4_RELATIVE_L2


def _lora_product(
    rows: int, outs: list[int], case: Any, epilogue: str = "none", lora: bool = True
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the values of x, and the dense parts of a merged product with the adapters of `case`."""
    k = 192
    parts = [nf4.quantize(_randn(n, k, seed=s) * 0.1) for s, n in enumerate(outs)]
    x, factor, values = _inputs(rows, k)
    first = len(case.matrices) - len(outs)
    starts = [sum(outs[:i]) for i in range(len(outs))]
    step = shrink(x, factor, case.lora, range(first, first + len(outs)), starts) if lora else None
    y = torch.empty(rows, sum(outs) // (2 if epilogue == "silu_mul" else 1))
    nf4_simt.product(x, factor, merge([pack_nf4(p) for p in parts]), y, lora=step, epilogue=epilogue)
    return y, values, [p.dequantize().double() for p in parts]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_adapters_in_a_merged_product(rows: int) -> None:
    """Parts that don't begin at tiles, ranks 4 to 40, one adapter that leaves a part alone, base rows between."""
    outs, ranks = [12, 7, 7], [4, 16, 40]
    row_slots = [[], [0], [1, 2], [2], [0, 1], [], [1], [2]][-rows:]
    case = make_lora(rows, 192, outs, ranks, row_slots=row_slots, missing={(5, 1)}, padding=1, first_module=4)
    y, values, parts = _lora_product(rows, outs, case)
    expected = torch.cat(
        [values @ p.T + case.delta(values, m) for p, m in zip(parts, range(4, 7), strict=True)], 1
    )  # fmt: skip
    assert relative_l2(y, expected) < TRITON_NF4_RELATIVE_L2
    plain, _, _ = _lora_product(rows, outs, case, lora=False)
    base = [i for i, slots in enumerate(row_slots) if not slots]
    assert torch.equal(y[base], plain[base]), "a row without an adapter has other bits"
    changed = [i for i, slots in enumerate(row_slots) if slots]
    assert not any(torch.equal(y[i], plain[i]) for i in changed)


@pytest.mark.parametrize("rows", [1, 4])
def test_adapters_before_silu_mul(rows: int) -> None:
    case = make_lora(rows, 192, [11, 11], [8, 16], aligned=True)
    y, values, parts = _lora_product(rows, [11, 11], case, "silu_mul")
    gate, up = (values @ p.T + case.delta(values, m) for m, p in enumerate(parts))
    assert relative_l2(y, torch.nn.functional.silu(gate) * up) < 2 * TRITON_NF4_RELATIVE_L2


def test_eight_adapters_in_eight_rows() -> None:
    case = make_lora(8, 192, [16], [4, 8, 16, 16, 32, 5, 128, 9])
    y, values, parts = _lora_product(8, [16], case)
    assert relative_l2(y, values @ parts[0].T + case.delta(values, 0)) < TRITON_NF4_RELATIVE_L2


# ---- the decode, and planted faults


def test_the_decode_over_all_patterns() -> None:
    prove_decode(
        nf4_simt.DECODE.value, nf4_simt.DECODE_CONSTRAINTS.value, code_of_level=CODE_OF_LEVEL, gain=GAIN, kind="f16"
    )


@pytest.mark.parametrize("fault", ["nibbles", "words", "scales"])
def test_planted_faults_are_found(fault: str) -> None:
    """Swapped nibbles, swapped words, the next group's scale: the comparison above sees each."""
    weight = nf4.quantize(_randn(8, 320))
    packed = pack_nf4(weight)
    words, absmax = packed.words, packed.absmax
    if fault == "nibbles":
        words = (words >> 4 & 0x0F0F0F0F) | (words & 0x0F0F0F0F) << 4
    elif fault == "words":
        words = words.view(8, -1, 2).flip(2).reshape(8, -1).contiguous()
    else:
        absmax = absmax.roll(1)
    x, factor, values = _inputs(2, 320)
    y = torch.empty(2, 8)
    nf4_simt.product(x, factor, TritonNf4(words, absmax, packed.nested, packed.map), y)
    assert relative_l2(y, values @ weight.dequantize().double().T) > 10 * TRITON_NF4_RELATIVE_L2


def test_a_swapped_slot_is_found() -> None:
    case = make_lora(2, 192, [16], [8, 8])
    rank, slots = case.lora.a_ptr.clone(), [1, 3]
    rank[:, slots] = rank[:, slots[::-1]]
    good = case.lora
    case.lora = replace(good, a_ptr=rank)
    y, values, parts = _lora_product(2, [16], case)
    assert relative_l2(y, values @ parts[0].T + case.delta(values, 0)) > 10 * TRITON_NF4_RELATIVE_L2


@pytest.mark.parametrize(
    "wrong", [{"epilogue": "other"}, {"epilogue": "add"}, {"residual": torch.zeros(1, 8)}, {"y": torch.zeros(1, 9)}]
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    weight = pack_nf4(nf4.quantize(_randn(8, 64)))
    arguments = {"y": torch.zeros(1, 8), **wrong}
    with pytest.raises(AssertionError):
        nf4_simt.product(torch.zeros(1, 64).half(), torch.ones(1), weight, **arguments)
