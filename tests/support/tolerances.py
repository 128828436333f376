"""The tolerance that an op of any provider is held to: distance from a float64 oracle, relative to its length.

One number for each dtype of activations. Inputs of an op are exact (whatever was rounded before is not its fault), so
what is left are float32 sums and, for bfloat16, the one rounding of the result.
"""

import torch
from torch import Tensor

# float32: sums of up to 2000 products; the largest seen is 4e-7 (and 1e-7 from the rounding of the result).
# bfloat16: rounding to 8 bits is off by at most 2^-9 = 1.95e-3 of a value, 1.7e-3 in the root mean square seen.
RELATIVE_L2 = {torch.float32: 1e-6, torch.bfloat16: 2e-3}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; NaN anywhere gives NaN, and a zero oracle demands zeros."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected.double()).norm()
    length = expected.double().norm()
    return float(error / length) if length > 0 else float(error)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """`actual`, computed with activations in `dtype`, is the float64 `expected` within the tolerance."""
    error = relative_l2(actual, expected)
    assert error <= RELATIVE_L2[dtype], f"relative l2 error {error:.3g} (allowed: {RELATIVE_L2[dtype]:.3g})"
