"""The operands of `product`, which the three files that multiply NF4 weights share (nf4_simt, nf4_dot, nf4_dequant).

Knows no kernels. Called by each `product` before it launches.
"""

import torch
from torch import Tensor

from guanaco.kernels.triton.products.lora import LoraStep
from guanaco.kernels.triton.products.pack import TritonNf4

EPILOGUES = ("none", "add", "silu_mul")


def output_width(
    x: Tensor,
    row_factor: Tensor,
    weight: TritonNf4,
    y: Tensor,
    bias: Tensor | None,
    lora: LoraStep | None,
    epilogue: str,
    residual: Tensor | None,
) -> int:
    """Check the operands and return the width of y[rows, width] = (x · row_factor) · Wᵀ + bias + LoRA, then the
    epilogue.

    All tensors are contiguous. x float16 [rows, k], |x| < 4096; row_factor float32 [rows], powers of two; bias float32
    [n]; y float32, float16 or bfloat16.
    epilogue "add": add residual, which has y's shape and dtype and may be y itself. "silu_mul": W has gate above up,
    and y [rows, n / 2] = SiLU(gate) · up.
    lora: the result of `shrink` for the same x. Rows without adapters get the same bits as without lora.
    """
    rows, k = x.shape
    assert epilogue in EPILOGUES, epilogue
    assert (epilogue == "add") == (residual is not None), epilogue
    assert x.dtype == torch.float16, x.dtype
    assert k == weight.k, (x.shape, weight.n, weight.k)
    width = weight.n // 2 if epilogue == "silu_mul" else weight.n
    assert y.shape == (rows, width), (y.shape, rows, width)
    assert residual is None or (residual.shape == y.shape and residual.dtype == y.dtype), (residual.shape, y.shape)
    assert all(t.is_contiguous() for t in (x, y, row_factor, bias, residual) if t is not None)
    assert epilogue != "silu_mul" or lora is None or tuple(lora.part_starts) == (0, width), lora.part_starts
    return width
