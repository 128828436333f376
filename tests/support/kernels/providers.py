"""The kernel providers that the op tests run over: each must agree with the same float64 oracle.

The portable code of the `cpu` provider runs anywhere; a faster ISA is left out only where this processor lacks it.
`triton` runs in Triton's interpreter, a thousand times slower: tests of many examples take a few of it.
"""

from importlib.util import find_spec
from typing import Any

import torch

from guanaco.kernels import load_ops
from guanaco.kernels.cpu.library import available_isas

CPU = torch.device("cpu")
# As the server would use them, and with every ISA that this processor has.
FAST = ("reference", *(f"cpu-{isa}" for isa in available_isas()))
INTERPRETED = ("triton",) if find_spec("triton") else ()
PROVIDERS = (*FAST, *INTERPRETED)


def provider_ops(name: str, dtype: torch.dtype = torch.float32, *, threads: int = 2, budget: int = 0) -> Any:
    """The ops called `name` in PROVIDERS. budget: bytes of decoded weights, for the reference alone."""
    provider, _, isa = name.partition("-")
    return load_ops(
        provider, device=CPU, dtype=dtype, decoded_weights_bytes=budget, threads=threads, cpu_isa=isa or "auto"
    )
