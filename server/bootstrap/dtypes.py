"""The dtypes of activations, keys and values, chosen by the settings and the provider.

Used by `runtime` and `doctor`.
"""

import torch

from guanaco.kernels import Ops
from guanaco.server.bootstrap.gpu import Gpu
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def compute_dtype(settings: Settings, provider: str, gpu: Gpu | None) -> torch.dtype:
    """The dtype of activations. Raises CommandError if the provider doesn't have it. The native kernels compute in
    float32 in any case, and only store K and V in this dtype."""
    if settings.dtype == "float16" and provider != "triton":
        raise CommandError(f"--dtype float16 is for the triton provider; {provider} has float32 and bfloat16")
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    if provider == "triton" and gpu is not None and gpu.capability < (8, 0):
        return torch.float16
    return torch.float32 if provider == "reference" else torch.bfloat16


def cache_dtype(settings: Settings, ops: Ops) -> torch.dtype:
    """The dtype in which K and V are stored. Raises CommandError if the provider or the GPU doesn't have it."""
    if settings.kv_cache_dtype == "auto":
        return ops.dtype
    wanted = _CACHE_DTYPES[settings.kv_cache_dtype]
    if wanted in ops.cache_dtypes:
        return wanted
    option = f"--kv-cache-dtype {settings.kv_cache_dtype}"
    if torch.int8 in ops.cache_dtypes:
        raise CommandError(f"{option} needs a GPU of compute capability 8.9 or later: use int8, which has finer steps")
    raise CommandError(f"{option} is for the triton and reference providers; {ops.name} keeps K and V in --dtype")


def expected_cache_dtype(settings: Settings) -> torch.dtype:
    """The cache dtype to expect before a provider is chosen."""
    if settings.kv_cache_dtype != "auto":
        return _CACHE_DTYPES[settings.kv_cache_dtype]
    return _DTYPES.get(settings.dtype, torch.float32 if settings.provider == "reference" else torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`: `bfloat16`, `float8_e4m3fn`."""
    return str(dtype).removeprefix("torch.")
