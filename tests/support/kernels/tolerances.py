"""The tolerance that an op of any provider is held to: distance from a float64 oracle, relative to its length.

One number for each dtype of activations. Inputs of an op are exact (whatever was rounded before is not its fault), so
what is left are float32 sums and, for bfloat16, the one rounding of the result.
"""

import torch
from torch import Tensor

# float32: 7e-7 is the most that was seen in 600 random cases of attention, 2.5e-7 in linear layers.
# bfloat16: one rounding to 8 bits is off by 2^-8 = 3.9e-3 of a value at most, 1.7e-3 in the root mean square.
RELATIVE_L2 = {torch.float32: 2e-6, torch.bfloat16: 4e-3}

# Products of NF4 weights by the native kernels: activations of 14 bits, levels of 13, scales of 16. Measured: 1.0e-4 to
# 1.4e-4 in long rows, more in a row of one group.
INTEGER_NF4_RELATIVE_L2 = {torch.float32: 3e-4, torch.bfloat16: 4e-3}

# Products of NF4 weights by the Triton kernels, in float32; activations are given in float16. Levels are rounded to 11
# bits, and nf4_simt sums eight products in float16: 4.1e-4 in long rows, 1.0e-3 was seen in a result of four numbers.
# The ceiling of them all.
TRITON_NF4_RELATIVE_L2 = 1.5e-3


def relative_l2(actual: Tensor, expected: Tensor, length: float = 0.0) -> float:
    """‖actual − expected‖ / max(‖expected‖, length) in float64; NaN anywhere gives NaN; a zero oracle demands zeros.

    length: what ‖expected‖ ordinarily is, where a result of few elements can come out small by cancellation.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = float((actual.double() - expected.double()).norm())
    length = max(length, float(expected.double().norm()))
    return error / length if length > 0 else error


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    length: float = 0.0,
    *,
    integer_nf4: bool = False,
    half_nf4: bool = False,
) -> None:
    """`actual`, computed with activations in `dtype`, is the float64 `expected` within the tolerance.

    integer_nf4: it is a product of NF4 weights that the `cpu` provider computes in integers; half_nf4: one that the
    `triton` provider computes in float16.
    """
    allowed = (INTEGER_NF4_RELATIVE_L2 if integer_nf4 else RELATIVE_L2)[dtype]
    if half_nf4:
        allowed = max(allowed, TRITON_NF4_RELATIVE_L2)
    error = relative_l2(actual, expected, length)
    assert error <= allowed, f"relative l2 error {error:.3g} (allowed: {allowed:.3g})"
