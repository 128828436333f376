"""The GPU that the `triton` provider would use, if there is one.

Asks torch; knows nothing of models. Used by `runtime`, `serve` and `doctor`. It has never run on a machine with a GPU.
"""

import warnings
from dataclasses import dataclass

import torch

from guanaco.kernels import Ops

# The oldest driver for each major version of CUDA, from the tables of NVIDIA's "CUDA Compatibility".
_OLDEST_DRIVER = {"12": "525.60", "13": "580"}
_NEWEST_CUDA = "13"


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


def device_of(ops: Ops) -> str:
    """What the kernels run on, for people: the GPU's name and architecture, or the processor's instruction set."""
    if ops.device.type == "cuda" and (gpu := find_gpu()) is not None:
        return f"{gpu.name}, {gpu.target}"
    isa = getattr(ops, "isa", None)
    return "CPU" if isa is None else f"CPU, {isa}"


def no_gpu_text() -> str:
    """One line for an operator who has asked for a GPU where torch finds none: why, and what to do."""
    cuda = str(torch.version.cuda or _NEWEST_CUDA).partition(".")[0]
    driver = _OLDEST_DRIVER.get(cuda, _OLDEST_DRIVER[_NEWEST_CUDA])
    return (
        f"--provider triton needs an NVIDIA GPU, and torch finds none: {_why_none()}. Install NVIDIA's driver {driver} "
        "or newer on the host; for a container, install the NVIDIA Container Toolkit too and start the container with "
        "`--gpus all`. To compute on the processor, say --provider cpu (GUANACO_PROVIDER=cpu)"
    )


def _why_none() -> str:
    """Why torch finds no GPU: its build, or the first sentence of its own error."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return " ".join(str(error).split()).partition(". ")[0][:200].rstrip(".")
    return "the driver shows no device to this process"
