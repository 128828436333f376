"""`nf4_dequant` in Triton's interpreter against float64, in NaN-filled memory, and its machine code."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.kernels import nf4_proof
from support.kernels.product_cases import ProductCase, make_product, make_weight

pytest.importorskip("triton")

from guanaco.kernels.triton.products import nf4_dequant
from guanaco.kernels.triton.products.pack import CODE_OF_LEVEL, GAIN, merge, pack_nf4

pytestmark = pytest.mark.usefixtures("nan_poison")

# Measured: 5e-5 (k = 4096) to 1.8e-4: levels in float16, and weights in float16 after that; the issue allows 1.5e-3.
TOLERANCE = 2.5e-4
SILU_TOLERANCE = 1.2e-3  # see test_nf4_dot.py


def check(case: ProductCase, dtype: torch.dtype = torch.float32) -> None:
    tolerance = SILU_TOLERANCE if case.epilogue == "silu_mul" else TOLERANCE
    tolerance += {torch.float32: 0.0, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    assert case.error(nf4_dequant.product, dtype) < tolerance


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 40 rows of k = 128, so that small matrices have several and the last one is short."""
    monkeypatch.setattr(nf4_dequant, "SLICE_WEIGHTS", 40 * 128)


def test_the_decode_of_all_patterns() -> None:
    nf4_proof.prove_decode(
        nf4_dequant.DECODE.value, nf4_dequant.CONSTRAINTS.value, code_of_level=CODE_OF_LEVEL, gain=GAIN, kind="f16"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_decoded_weights(dtype: torch.dtype, double_quant: bool) -> None:
    """Every row of a merged matrix whose nested scales change inside rows; two roundings of 16 bits at the most."""
    weights = [make_weight(n, 320, double_quant=double_quant, seed=n) for n in (51, 77)]
    expected = torch.cat([w.dequantize() for w in weights])
    packed = merge([pack_nf4(w) for w in weights])
    out = torch.empty(100, 320, dtype=dtype)
    nf4_dequant.dequantize(packed, out, 17)
    bound = {torch.float16: 2.1e-4 + 4.9e-4, torch.bfloat16: 2.1e-4 + 3.9e-3}[dtype]
    difference = (out.double() - expected[17:117].double()).abs()
    assert bool((difference <= bound * expected[17:117].double().abs() + 6e-8).all())


@pytest.mark.parametrize("rows", [1, 16, 65, 100])
def test_odd_rows(rows: int) -> None:
    check(make_product(rows, [131], 192, bias=True))


@pytest.mark.parametrize("epilogue", ["none", "add", "silu_mul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small_slices")
def test_epilogues_slice_by_slice(epilogue: str, dtype: torch.dtype) -> None:
    check(make_product(70, [70, 70], 128, epilogue=epilogue, bias=True), dtype)


@pytest.mark.usefixtures("small_slices")
def test_the_residual_may_be_the_result() -> None:
    case = make_product(70, [70], 128, epilogue="add")
    expected = case.expected()
    assert case.residual is not None
    y = case.residual.clone()
    nf4_dequant.product(case.x, case.row_factor, case.packed, y, epilogue="add", residual=y)
    assert float((y.double() - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize(("outs", "epilogue"), [([100], "none"), ([70, 40, 40], "add"), ([60, 60], "silu_mul")])
@pytest.mark.usefixtures("small_slices")
def test_adapters(outs: list[int], epilogue: str) -> None:
    """Blocks of rows that use one adapter, two, another or none, over slices that parts begin and end in."""
    row_slots = [[0]] * 20 + [[0, 1]] * 5 + [[2]] * 20 + [[]] * 21
    check(make_product(66, outs, 128, ranks=[4, 16, 40], row_slots=row_slots, epilogue=epilogue, padding=1))


@pytest.mark.usefixtures("small_slices")
def test_rows_without_adapters_keep_their_bits() -> None:
    row_slots = [[0], [], [1], []] * 17
    case = make_product(68, [100], 128, ranks=[4, 128], row_slots=row_slots, bias=True)
    with_adapters, without = case.run(nf4_dequant.product), replace(case, step=None).run(nf4_dequant.product)
    unused = torch.tensor([not s for s in row_slots])
    assert torch.equal(with_adapters[unused], without[unused])
    assert not torch.equal(with_adapters[~unused], without[~unused])


def test_values_beyond_float16() -> None:
    """Sums of scaled rows are larger than float16 can be."""
    case = make_product(3, [64], 256)
    case.x *= 800.0
    assert case.expected().abs().div(case.row_factor.double()[:, None]).max() > 4 * 65504 / 800
    case.x = (case.x.float().sign() * 4000.0).half()
    check(case)


def test_an_empty_batch() -> None:
    case = make_product(0, [64], 64)
    assert case.run(nf4_dequant.product).shape == (0, 64)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_anything(data: st.DataObject) -> None:
    rows, parts = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 3))
    epilogue = data.draw(st.sampled_from(["none", "add", *(["silu_mul"] if parts == 2 else [])]))
    n = data.draw(st.integers(1, 120))
    outs = [n] * parts if epilogue == "silu_mul" else [data.draw(st.integers(1, 120)) for _ in range(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4_dequant, "SLICE_WEIGHTS", data.draw(st.integers(1 << 13, 1 << 16)))
        check(
            make_product(
                rows, outs, 64 * data.draw(st.integers(1, 4)), double_quant=data.draw(st.booleans()),
                bias=data.draw(st.booleans()), epilogue=epilogue, seed=data.draw(st.integers(0, 99)),
            )
        )  # fmt: skip


# ---- planted bugs


@pytest.mark.parametrize(
    ("old", "new"), [("{$4, $5}, g", "{$5, $4}, g"), ("0x7362", "0x7326"), ("xor.b32 v, $8", "xor.b32 v, q")]
)
def test_planted_faults_of_the_decode_are_found(old: str, new: str) -> None:
    text = nf4_dequant.DECODE.value.replace(old, new)
    assert text != nf4_dequant.DECODE.value
    with pytest.raises(AssertionError, match="instead of"):
        nf4_proof.prove_decode(text, nf4_dequant.CONSTRAINTS.value, code_of_level=CODE_OF_LEVEL, gain=GAIN, kind="f16")


def test_slices_that_begin_one_row_late_are_found(monkeypatch: pytest.MonkeyPatch, small_slices: None) -> None:
    plain = nf4_dequant.dequantize
    monkeypatch.setattr(nf4_dequant, "dequantize", lambda w, out, start: plain(w, out, max(start - 1, 0)))
    assert make_product(70, [100], 128).error(nf4_dequant.product) > 10 * TOLERANCE


# ---- machine code
