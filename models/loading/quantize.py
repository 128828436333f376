"""Dense weights → a bitsandbytes-format NF4 checkpoint, one tensor at a time.

Knows the format on disk and which tensors become 4-bit, but not how they are served. Called by `guanaco quantize`, by
the loader (which quantises by the same rule and caches the result) and by the demo's conversion.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from guanaco.kernels.cpu.quantize import quantize
from guanaco.kernels.nf4 import SOURCE_DTYPES, Nf4Weight, dtype_name
from guanaco.kernels.nf4_state import to_state
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.registry import layer_of, projection_shapes
from guanaco.models.errors import ModelError
from guanaco.models.formats.leftovers import PartialFolder
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.checkpoint import Checkpoint, open_checkpoint
from guanaco.models.loading.gguf_checkpoint import GgufCheckpoint
from guanaco.models.loading.progress import Progress
from guanaco.models.text.gguf_tokenizer import tokenizer_files

_WEIGHT_IN_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.(.+)\.weight")

# Files that are copied with the weights: the tokenizer, sampling defaults, and the licence, which binds derived works.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
MAX_SHARD_BYTES = 1 << 30  # also the most memory that a conversion needs beside its largest tensor

_DAMAGED = "the checkpoint seems damaged: fetch it again"


@dataclass(frozen=True)
class QuantizeReport:
    """The numbers of a conversion. Bytes are those of tensors."""

    num_quantized: int
    num_dense: int
    source_bytes: int
    written_bytes: int
    ignored: tuple[str, ...]  # names of stored tensors that the architecture does not have


def is_projection(name: str, config: ModelConfig) -> bool:
    """Whether the tensor called `name`, with `model.` or without, is stored in NF4.

    As in QLoRA these are the projections of every layer, which the architecture names. Everything else stays in 16
    bit: embeddings and head, norms and biases.
    """
    match = _WEIGHT_IN_LAYER.fullmatch(name)
    return match is not None and match[1] in projection_shapes(config)


def quantize_tensor(name: str, tensor: Tensor, *, double_quant: bool = True) -> Nf4Weight:
    """The NF4 weight of a projection [out, in] in float32, float16 or bfloat16. Raises ModelError that names it."""
    try:
        return quantize(tensor, double_quant=double_quant)
    except ValueError as error:
        raise ModelError(f"{name}: {error}; {_DAMAGED}") from error


def dense_tensor(name: str, tensor: Tensor, *, keep_float32: bool = False) -> Tensor:
    """A tensor that is not quantised, in the dtype in which it is served: 16-bit floats as they are, float32 as
    bfloat16 unless `keep_float32`.

    bfloat16 has float32's range, so nothing overflows, and it halves the bytes of embedding and head that every step
    reads. Raises ModelError for another dtype, and for values that are not finite.
    """
    if tensor.dtype not in SOURCE_DTYPES:
        raise ModelError(
            f"{name}: dtype {dtype_name(tensor.dtype)} is not supported: give a checkpoint in fp16, bf16 or fp32"
        )
    if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
        raise ModelError(f"{name} holds values that are not finite (NaN or infinity); {_DAMAGED}")
    return tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 and not keep_float32 else tensor


def quantization_config(*, double_quant: bool) -> dict[str, Any]:
    """The `quantization_config` of config.json with which transformers loads the checkpoint as it is."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        # The Guanaco models were trained with bfloat16. With float16, a fifth of QLoRA's 7B runs diverged (its README).
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


class Nf4CheckpointWriter:
    """Writes a checkpoint directory shard by shard beside `dst`, which appears complete or not at all.

    Use as a context manager: leaving it by an exception removes what was written. `config` is the model's config.json
    without quantisation. Raises ModelError if `dst` exists or cannot be written.
    """

    def __init__(
        self,
        dst: Path,
        config: Mapping[str, Any],
        *,
        double_quant: bool = True,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        is_durable: bool = True,
    ) -> None:
        """is_durable: wait until the disk has everything, so that a power cut cannot leave a damaged directory."""
        if dst.exists():
            raise ModelError(f"{dst} exists already: remove it, or name a directory that does not exist yet")
        self.dst = dst
        self.written_bytes = 0
        self._config = dict(config)
        self._double_quant = double_quant
        self._max_shard_bytes = max_shard_bytes
        self._is_durable = is_durable
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._shard_names: list[list[str]] = []
        self._dense_dtype: torch.dtype | None = None
        try:
            # Hidden, and on the same file system, so that the last step is a rename.
            self._partial = PartialFolder(dst)
            self._directory = self._partial.path
        except OSError as error:
            raise _write_error(dst, error) from error

    def add(self, name: str, tensor: Nf4Weight | Tensor) -> None:
        """Append one tensor under its Hugging Face name. The caller need not keep it."""
        if isinstance(tensor, Nf4Weight):
            assert tensor.is_double_quantized == self._double_quant, name
            state = to_state(tensor, name)
        else:
            state = {name: tensor.detach().contiguous()}
            self._dense_dtype = self._dense_dtype or tensor.dtype
        size = sum(t.numel() * t.element_size() for t in state.values())
        if self._shard and self._shard_bytes + size > self._max_shard_bytes:
            self._flush()
        self._shard |= state
        self._shard_bytes += size
        self.written_bytes += size

    def copy_file(self, path: Path) -> None:
        """Copy a small file, under its own name."""
        try:
            shutil.copyfile(path, self._directory / path.name)
        except OSError as error:
            raise _write_error(self.dst, error) from error

    def write_text(self, name: str, text: str) -> None:
        """Add a small text file."""
        try:
            (self._directory / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise _write_error(self.dst, error) from error

    def close(self) -> None:
        """Write the last shard, the index and config.json, and give the directory its name."""
        if self._shard:
            self._flush()
        count = len(self._shard_names)
        assert count, "a checkpoint without tensors"
        dtype = dtype_name(self._dense_dtype or torch.bfloat16)
        # transformers 5 reads `dtype`, older readers `torch_dtype`.
        config = self._config | {
            "dtype": dtype,
            "torch_dtype": dtype,
            "quantization_config": quantization_config(double_quant=self._double_quant),
        }
        try:
            weight_map: dict[str, str] = {}
            for number, names in enumerate(self._shard_names, start=1):
                file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
                (self._directory / _shard_file(number)).rename(self._directory / file)
                weight_map |= dict.fromkeys(names, file)
            if count > 1:
                index = {"metadata": {"total_size": self.written_bytes}, "weight_map": weight_map}
                _write_json(self._directory / "model.safetensors.index.json", index)
            _write_json(self._directory / "config.json", config)
            for written in self._directory.glob("*.json"):
                self._sync(written)
            self._sync(self._directory)
            # mkdtemp makes directories that only their owner may read; others may read a model.
            self._directory.chmod(0o755)
            if self.dst.exists():
                raise ModelError(f"{self.dst} appeared while it was being written: remove one of the two and repeat")
            self._directory.rename(self.dst)
            self._partial.close()
            self._sync(self.dst.parent)
        except OSError as error:
            raise _write_error(self.dst, error) from error

    def discard(self) -> None:
        """Remove what has been written so far."""
        self._shard = {}
        self._partial.close()

    def _flush(self) -> None:
        path = self._directory / _shard_file(len(self._shard_names) + 1)
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
            self._sync(path)
        except (OSError, SafetensorError) as error:
            raise _write_error(self.dst, error) from error
        self._shard_names.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _sync(self, path: Path) -> None:
        if self._is_durable:
            _sync(path)

    def __enter__(self) -> "Nf4CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise


def quantize_checkpoint(
    src: Path,
    dst: Path,
    *,
    double_quant: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Convert a dense model (a Hugging Face directory of safetensors, or a GGUF file) to an NF4 directory.

    At most one source tensor and one output shard are in memory. progress: called with (tensor, elements done, elements
    in all). Raises ModelError if `src` cannot be converted, or if `dst` exists or cannot be written. After an error
    nothing is left at `dst`.
    """
    num_quantized = num_dense = 0
    with (
        closing(open_checkpoint(src)) as source,
        Nf4CheckpointWriter(
            dst, _config_fields(source), double_quant=double_quant, max_shard_bytes=max_shard_bytes
        ) as writer,
    ):
        if source.is_quantized:
            raise ModelError(
                f"{src} is in NF4 already: serve it as it is, or give the dense model from which it was made"
            )
        if isinstance(source, GgufCheckpoint):
            for file, text in tokenizer_files(source.metadata, str(source.path)).items():
                writer.write_text(file, text)
        done_values, num_values = 0, sum(math.prod(shape) for _, shape in weight_shapes(source.config))
        for name, shape in weight_shapes(source.config):
            stored = source.matrix(name, shape) if len(shape) == 2 else source.tensor(name, shape)
            assert isinstance(stored, Tensor), name  # the source says that nothing in it is quantised
            try:
                if is_projection(name, source.config):
                    writer.add(full_name(name), quantize_tensor(name, stored, double_quant=double_quant))
                    num_quantized += 1
                else:
                    writer.add(full_name(name), dense_tensor(name, stored))
                    num_dense += 1
            except ModelError as error:
                raise ModelError(f"{src}: {error}") from error
            if progress is not None:
                done_values += math.prod(shape)  # not bytes: a GGUF file has fewer bytes than its decoded tensors
                progress(name, done_values, num_values)
        ignored = source.unused()
        for file in COMPANION_FILES:
            if (src / file).is_file():
                writer.copy_file(src / file)
    return QuantizeReport(num_quantized, num_dense, source.num_bytes, writer.written_bytes, ignored)


def full_name(name: str) -> str:
    """A decoder's tensor as Hugging Face names it: `model.layers.0.…`, but `lm_head.weight`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model, in the order of the forward pass."""
    hidden = config.hidden_size
    yield "embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        for name, shape in layer_of(config).tensors():
            yield f"layers.{layer}.{name}", shape
    yield "norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _config_fields(source: Checkpoint) -> dict[str, Any]:
    """config.json of the result: the source's own, where it has one."""
    if not (source.path / "config.json").is_file():
        return source.config.to_json()
    # The source may store a head of its own although its config says that the head is tied.
    return read_json(source.path / "config.json") | {"tie_word_embeddings": source.config.tie_word_embeddings}


def _shard_file(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Write a file or directory through to the disk, so that a power cut cannot leave a name without its bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(dst: Path, error: Exception) -> ModelError:
    free = shutil.disk_usage(dst.parent).free >> 20 if dst.parent.is_dir() else 0
    return ModelError(f"cannot write {dst} ({error}; {free} MiB are free there): make room or name another place")
