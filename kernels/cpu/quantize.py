"""Quantising to NF4 on all cores: the same bits as `kernels.nf4.quantize`, by native code.

Used at a model's first start, where `nf4.quantize` would take most of the time. Called by `models.loading.quantize`.
"""

import os
from ctypes import byref, c_int32
from functools import cache

import torch
from torch import Tensor

from guanaco.kernels import nf4
from guanaco.kernels.cpu.library import Context
from guanaco.kernels.cpu.lora import DTYPES
from guanaco.kernels.nf4 import GROUP_SIZE, Nf4Weight
from guanaco.kernels.ops import NativeUnavailable


def quantize(matrix: Tensor, *, double_quant: bool = True) -> Nf4Weight:
    """`nf4.quantize` in native code. Without a native library, or for a matrix on another device, calls that function.

    Raises ValueError for other dtypes or dimensions, an empty matrix, and values that are not finite.
    """
    context = _context() if matrix.device.type == "cpu" else None
    if context is None:
        return nf4.quantize(matrix, double_quant=double_quant)
    nf4.check_matrix(matrix)
    flat = matrix.detach().contiguous().view(-1)
    groups, rest = divmod(flat.numel(), GROUP_SIZE)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(groups + bool(rest), dtype=torch.float32)
    finite = c_int32(1)
    arguments = (flat.data_ptr(), DTYPES[flat.dtype], groups, packed.data_ptr(), absmax.data_ptr(), byref(finite))
    context.call("nf4_quantize", *arguments)
    if not finite.value:
        raise ValueError(nf4.NOT_FINITE)
    if rest:
        packed[groups * GROUP_SIZE // 2 :], absmax[groups:] = nf4.quantize_groups(flat[groups * GROUP_SIZE :])
    return nf4.from_groups(packed, absmax, matrix, double_quant=double_quant)


@cache
def _context() -> Context | None:
    """Threads for every core that this process may use; None if there is no native library or they can't start."""
    try:
        return Context("auto", len(os.sched_getaffinity(0)))
    except (NativeUnavailable, MemoryError):
        return None
