"""The ops of LLaMA-like decoders, and the providers that compute them.

`Ops` is the contract; `reference` (plain PyTorch) is its specification, `cpu` is native code for the processor,
`triton` is for an NVIDIA GPU. A provider is chosen once, by name, at start. Imports no other package of Guanaco. Start
with `ops.py`.
"""

from importlib.util import find_spec

import torch

from guanaco.kernels.ops import (
    CPU_ISAS,
    DecodesRows,
    Draw,
    FusedLayers,
    LayerWeights,
    LinearHandle,
    NativeUnavailable,
    NoGpu,
    Ops,
    PackedWeight,
)

__all__ = [
    "CPU_ISAS",
    "PROVIDERS",
    "DecodesRows",
    "Draw",
    "FusedLayers",
    "LayerWeights",
    "LinearHandle",
    "NativeUnavailable",
    "NoGpu",
    "Ops",
    "PackedWeight",
    "load_ops",
]

PROVIDERS = ("reference", "cpu", "triton")


def load_ops(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    decoded_weights_bytes: int = 0,
    threads: int = 1,
    cpu_isa: str = "auto",
    side_stream: bool = False,
    in_torch_threads: bool = False,
) -> Ops:
    """The provider called `name`.

    decoded_weights_bytes: memory that the `reference` provider may spend on weights kept decoded (0: it keeps none).
    threads, cpu_isa: settings of the `cpu` provider. cpu_isa is a name in CPU_ISAS, or "auto" for the best one that
    this processor has.
    in_torch_threads: the `cpu` provider works on torch's threads instead of its own. For callers whose calls alternate
    with torch's.
    side_stream: the `triton` provider copies adapters to the GPU on a CUDA stream of their own.
    Raises ValueError for a name that is not in PROVIDERS, NativeUnavailable if the provider's kernels can't be used,
    and MemoryError if the `cpu` provider can't start its threads.
    """
    if name == "reference":
        from guanaco.kernels.reference import ReferenceOps

        return ReferenceOps(device=device, dtype=dtype, decoded_weights_bytes=decoded_weights_bytes)
    if name == "cpu":
        from guanaco.kernels.cpu.ops import CpuOps

        return CpuOps(dtype=dtype, threads=threads, isa=cpu_isa, in_torch_threads=in_torch_threads)
    if name == "triton":
        if find_spec("triton") is None:
            raise NativeUnavailable("the triton provider needs Triton, which is not installed (pip install triton)")
        from guanaco.kernels.triton.ops import TritonOps

        return TritonOps(device=device, dtype=dtype, side_stream=side_stream)
    raise ValueError(f"unknown kernel provider {name!r}; this build has: {', '.join(PROVIDERS)}")
