"""Matrices at the edges of the NF4 format: tiny, constant, sparse, on and beside the thresholds between levels."""

import torch
from torch import Tensor

from guanaco.kernels import nf4

KINDS = ("normal", "tiny", "sparse", "constant", "zero rows", "spread", "one group", "levels", "near thresholds")


def make_matrix(kind: str, out_features: int, in_features: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(out_features, in_features, generator=generator)
    match kind:
        case "tiny":  # around 1e-38, where absmax is clamped, and into the subnormal numbers
            x *= 10.0 ** torch.randint(-44, -28, (out_features, 1), generator=generator)
        case "sparse":
            x *= torch.rand(x.shape, generator=generator) < 0.01
        case "constant":  # every scale equals the mean: a nested absmax of zero
            x = torch.full_like(x, 0.75) * x.sign()
        case "zero rows":
            x[::2] = 0.0
        case "spread":
            x *= 10.0 ** torch.randint(-6, 4, (out_features, 1), generator=generator)
        case "one group":
            x.view(-1)[64:] = 0.0
        case "levels":  # values on the levels and on the thresholds between them
            table = nf4.levels(torch.device("cpu"))
            pool = torch.cat([table, (table[:-1] + table[1:]) / 2])
            x = pool[torch.randint(0, len(pool), x.shape, generator=generator)]
        case "near thresholds":  # where a product with the reciprocal and a quotient fall on different sides
            x = near_thresholds(x.numel(), generator).view(x.shape)
    return x.to(dtype)


def near_thresholds(count: int, generator: torch.Generator) -> Tensor:
    """float32 [count]: in each group of 64 an absmax, and values a few steps around absmax × threshold."""
    table = nf4.levels(torch.device("cpu"))
    thresholds = (table[:-1] + table[1:]) / 2
    absmax = 10.0 ** (torch.rand(-(-count // 64), 1, generator=generator) * 8 - 5)
    values = thresholds[torch.randint(0, 15, (len(absmax), 64), generator=generator)] * absmax
    bits = values.view(torch.int32) + torch.randint(-2, 3, values.shape, generator=generator, dtype=torch.int32)
    values = bits.view(torch.float32)
    values[:, :1] = absmax
    return values.view(-1)[:count]
