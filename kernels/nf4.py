"""The NF4 format: levels, packing, quantising, double quantisation. Bit-identical to bitsandbytes 0.50 on the CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZE = 64
NESTED_GROUP_SIZE = 256


@dataclass(frozen=True)
class Nf4Weight:
    """One quantised matrix [out_features, in_features], as stored: level × scale in float32 is what a weight *is*.

    Groups of 64 run over the row-major flattened matrix, so they cross rows where in_features is no multiple of 64.
    """

    packed: Tensor  # uint8 [(n·k + 1) // 2], two codes a byte, the first weight in the high nibble
    absmax: Tensor  # float32 [groups]; with double quantisation uint8 [groups], codes into nested_map
    shape: tuple[int, int]
    source_dtype: torch.dtype  # dtype before quantisation; not the compute dtype
    nested_absmax: Tensor | None = None  # float32 [ceil(groups / 256)]
    nested_map: Tensor | None = None  # float32 [256]
    nested_offset: float = 0.0
