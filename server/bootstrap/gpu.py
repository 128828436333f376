"""The GPU that the `triton` provider would use, if there is one.

Asks torch; knows nothing of kernels or models. Used by `runtime` and `doctor`. It has never run on a machine with a
GPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch describes it. Sizes are in bytes."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int

    @property
    def target(self) -> str:
        """The GPU's architecture in NVIDIA's spelling: `sm_80`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def find_gpu() -> Gpu | None:
    """The first CUDA GPU; None if torch finds none (no GPU, no driver, or a build of torch without CUDA)."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0), total, free)
