"""The GPU that the `triton` provider would use, if there is one.

One look through torch; knows nothing of kernels or models. Used by the wiring and `doctor`. What it says of a GPU has
never been tried: nobody who wrote this had one.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Sizes in bytes."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int

    @property
    def target(self) -> str:
        """`sm_80`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def find_gpu() -> Gpu | None:
    """The first CUDA GPU, or None where torch sees none (no GPU, no driver, or a build of torch without CUDA)."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0), total, free)
