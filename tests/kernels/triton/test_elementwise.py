"""The small Triton kernels, in Triton's interpreter, against float64; and what their machine code says."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.kernels.tolerances import RELATIVE_L2, relative_l2

pytest.importorskip("triton")

from guanaco.kernels.triton import elementwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float16: one rounding to 11 bits is off by 2^-11 = 4.9e-4 of a value at most (and a row may be one element), 2.1e-4
# in the root mean square. ScaledRows are rounded so, whatever the dtype.
TOLERANCE = {**RELATIVE_L2, torch.float16: 5e-4}
poisoned = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, length: float = 0.0) -> None:
    assert actual.dtype == dtype
    for row in range(len(expected)):
        assert relative_l2(actual[row], expected[row], length) <= TOLERANCE[dtype]


def check_scaled(scaled: elementwise.ScaledRows, expected: Tensor, length: float = 0.0) -> None:
    """Values, and that every factor is the power of two that it should be."""
    assert scaled.rows.dtype == torch.float16
    mantissa, _ = torch.frexp(scaled.factors)
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    value = scaled.rows.double() * scaled.factors.double()[:, None]
    for row in range(len(expected)):
        assert relative_l2(value[row], expected[row], length) <= TOLERANCE[torch.float16]
        largest = scaled.rows[row].abs().max()
        assert 2048 <= largest <= 4096 or (largest == 0 and scaled.factors[row] == 1)


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def exact_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return gate.double() / (1 + (-gate.double()).exp()) * up.double()


@poisoned
@given(
    t=st.integers(0, 5),
    width=st.sampled_from([1, 2, 33, 64, 500, 1025]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-4, 1.0, 100.0]),
    with_residual=st.booleans(),
)
def test_rms_norm(nan_poison: None, t: int, width: int, dtype: torch.dtype, size: float, with_residual: bool) -> None:
    x, residual = (randn(t, width, seed=s, dtype=dtype) * size for s in (1, 2))
    weight = randn(width, seed=3, dtype=torch.bfloat16)
    total = x + residual if with_residual else x  # rounded to the dtype, as the layers do it one op at a time
    arguments = (x, weight, 1e-5, residual if with_residual else None)
    y, summed = elementwise.rms_norm(*arguments)
    scaled, summed_too = elementwise.rms_norm_scaled(*arguments)
    assert torch.equal(summed, total)
    assert torch.equal(summed_too, total)
    check(y, exact_norm(total, weight, 1e-5), dtype)
    check_scaled(scaled, exact_norm(total, weight, 1e-5))
    assert torch.equal(y, elementwise.rms_norm(total, weight, 1e-5)[0]), "adding in the kernel changed the norm"


def test_rows_of_zeros(nan_poison: None) -> None:
    y, _ = elementwise.rms_norm(torch.zeros(2, 40), torch.ones(40), 1e-5)
    assert torch.equal(y, torch.zeros(2, 40))
    check_scaled(elementwise.scale_rows(torch.zeros(2, 40)), torch.zeros(2, 40))


@poisoned
@given(
    t=st.integers(0, 4),
    width=st.sampled_from([1, 33, 1024, 1500]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 5.0, 60.0]),
    merged=st.sampled_from(["both", "gate", "none"]),
)
def test_silu_mul(nan_poison: None, t: int, width: int, dtype: torch.dtype, size: float, merged: str) -> None:
    both = randn(t, 2 * width, seed=1, dtype=dtype) * size
    gate, up = both[:, :width], both[:, width:]
    gate, up = gate if merged != "none" else gate.contiguous(), up if merged == "both" else up.contiguous()
    expected = exact_silu_mul(gate, up)
    y = elementwise.silu_mul(gate, up)
    if dtype == torch.float16:  # the smallest products fall below its normal numbers; the scaled rows' do not
        torch.testing.assert_close(y, expected.to(dtype), rtol=2**-10, atol=2**-24)
    else:  # e^-x is known to x · 2^-24 of itself, which only shows where a row has nothing larger
        check(y, expected, dtype, length=1e-3 if size > 1 else 0.0)
    check_scaled(elementwise.silu_mul_scaled(gate, up), expected, length=1e-30)  # below, float32 ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e30])
def test_scaled_rows_keep_the_range(nan_poison: None, size: float, dtype: torch.dtype) -> None:
    """Beyond float16 in both directions, each row for itself, with one element that is a thousand times larger."""
    x = randn(5, 70, dtype=dtype) * size
    x[1] *= 1e-4
    x[2, 3] *= 1000
    check_scaled(elementwise.scale_rows(x), x.double())


def test_the_least_numbers_keep_their_precision(nan_poison: None) -> None:
    """Rows whose factor would be below float32's normal numbers get the least that is normal."""
    x = randn(2, 70) * 1e-36
    scaled = elementwise.scale_rows(x)
    assert (scaled.factors == 2.0**-126).all()
    assert relative_l2(scaled.rows.double() * 2.0**-126, x.double()) <= TOLERANCE[torch.float16]


def test_what_is_not_finite_stays_so(nan_poison: None) -> None:
    """One bad row is seen as such and harms no other."""
    x = randn(3, 40)
    x[0, 5], x[1, 7] = float("inf"), float("nan")
    scaled = elementwise.scale_rows(x)
    assert torch.isfinite(scaled.factors).all()
    assert scaled.rows[0, 5].isinf()
    assert scaled.rows[1, 7].isnan()
    check_scaled(elementwise.ScaledRows(scaled.rows[2:], scaled.factors[2:]), x[2:].double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("t", [0, 1, 5])
def test_embedding(nan_poison: None, t: int, stored: torch.dtype, dtype: torch.dtype) -> None:
    table = randn(50, 1030, dtype=stored)
    ids = torch.tensor([49, 0, 7, 7, 31])[:t]
    assert torch.equal(elementwise.embedding(ids, table, dtype), table[ids].to(dtype))


def test_argmax_takes_the_first_of_equals(nan_poison: None) -> None:
    logits = randn(6, 5003)
    logits[1, [4999, 2048, 2047]] = 9.0
    logits[2, [5002, 5001]] = 9.0
    logits[3] = float("-inf")
    logits[4] = float("-inf")
    logits[4, 5000] = -1e30
    logits[5] = 0.0
    found = elementwise.argmax(logits)
    assert found.tolist() == [int(logits[0].argmax()), 2047, 5001, 0, 5000, 0]
    assert elementwise.argmax(logits[:0]).shape == (0,)
    assert elementwise.argmax(logits[:, 7:8].contiguous()).tolist() == [0] * 6
