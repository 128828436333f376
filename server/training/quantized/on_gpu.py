"""The base on a GPU: transformers' model with bitsandbytes' layers over the NF4 codes that are served.

This has never run on a GPU. Its tests run it with the device `cpu`, where bitsandbytes computes the same. Knows no
data, recipes or jobs. Called by `server.training.base`.
"""

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.models.loading.quantize import quantize_checkpoint
from guanaco.server.training.quantized.model import base_fingerprint, load_base


def load_base_on(device: str, source: Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """As `load_base`, with the weights on `device` and bitsandbytes' layers. options: those of `load_base`.

    A dense source is quantised as `guanaco quantize` does it, into a temporary folder that is gone afterwards. Raises
    ModelError, ValueError and ImportError as `load_base` does.
    """
    served = load_base(source, dtype=dtype, **options)  # checks the source, and knows the fingerprint
    fingerprint, notes = base_fingerprint(served), served.guanaco_notes
    del served
    with closing(open_checkpoint(source)) as checkpoint:
        is_quantized = checkpoint.is_quantized
    with tempfile.TemporaryDirectory(prefix="guanaco-nf4-") as scratch:
        nf4 = source
        if not is_quantized:
            nf4 = Path(scratch) / "nf4"
            quantize_checkpoint(source, nf4)
        model = _bitsandbytes_model(nf4, device, dtype)
    model.requires_grad_(False)
    model.guanaco_fingerprint, model.guanaco_notes = fingerprint, notes
    return model


def _bitsandbytes_model(path: Path, device: str, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map={"": device}, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    # A checkpoint sets its own compute dtype, and its 16-bit tensors keep theirs. Here everything gets one dtype.
    linears: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for module in linears:
        module.weight.quant_state.dtype = dtype
        module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model
