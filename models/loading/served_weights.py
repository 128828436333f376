"""The weights of a checkpoint on their way into a model: quantised, checked, written to the cache, packed.

They pass one by one, so that only the finished model and about one tensor are in memory. Knows neither cache entries
nor locks. Called by `loader`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels import Ops, PackedWeight
from guanaco.kernels.nf4 import Nf4Weight, dtype_name
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.errors import ModelError
from guanaco.models.formats.shown import listed
from guanaco.models.loading.checkpoint import Checkpoint
from guanaco.models.loading.overlap import Behind, ReadAhead, StoredWeights
from guanaco.models.loading.packed_cache import PackedWeights, PackedWriter
from guanaco.models.loading.progress import Progress
from guanaco.models.loading.quantize import (
    Nf4CheckpointWriter,
    dense_tensor,
    is_projection,
    quantize_tensor,
    weight_shapes,
)

Served = Nf4Weight | Tensor


class Quantizer:
    """Reads the weights of a checkpoint in the form in which they are served. Dense projections become NF4, unless the
    checkpoint has NF4 weights already: then all weights stay as they are stored."""

    def __init__(self, source: Checkpoint, *, keep_float32: bool) -> None:
        self._source = source
        self._keep_float32 = keep_float32
        self.reader: StoredWeights = source  # the source itself, or one that reads ahead
        self._num_rounded = 0
        self._num_dense_projections = 0

    def matrix(self, name: str, shape: tuple[int, int]) -> Served:
        weight = self.reader.matrix(name, shape)
        if isinstance(weight, Nf4Weight):
            return weight
        if not self._source.is_quantized and is_projection(name, self._source.config):
            with self._naming_source():
                return quantize_tensor(name, weight)
        self._num_dense_projections += is_projection(name, self._source.config)
        return self._dense(name, weight)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._dense(name, self.reader.tensor(name, shape))

    def notes(self) -> list[str]:
        """Sentences for the operator about the source. Complete when the model is built."""
        notes = []
        if unused := self._source.unused():
            notes.append(f"{len(unused)} tensors are not part of this architecture and were ignored: {listed(unused)}")
        if self._num_dense_projections:
            notes.append(f"{self._num_dense_projections} projections are dense in the checkpoint and are served so")
        if self._num_rounded:
            notes.append(
                f"{self._num_rounded} float32 tensors that are not quantised (norms, embedding, head) are rounded to "
                "bfloat16: --dtype float32 keeps them"
            )
        return notes

    def _dense(self, name: str, tensor: Tensor) -> Tensor:
        if self._source.is_quantized:
            return tensor
        with self._naming_source():
            dense = dense_tensor(name, tensor, keep_float32=self._keep_float32)
        self._num_rounded += dense.dtype != tensor.dtype and not torch.equal(dense.to(tensor.dtype), tensor)
        return dense

    @contextmanager
    def _naming_source(self) -> Iterator[None]:
        """Add the model's path to a ModelError that only names the tensor."""
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{self._source.path}: {error}") from error


class Fingerprint:
    """The hex SHA-256 of a config and of all added weights. Refuses values that are not finite."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._path = path
        self._digest = hashlib.sha256(json.dumps(config.computation(), sort_keys=True).encode())

    def add(self, name: str, weight: Served) -> None:
        """Add a weight. Raises ModelError if it holds NaN or infinity."""
        values = weight.scales() if isinstance(weight, Nf4Weight) else weight
        if not all(torch.isfinite(bound) for bound in torch.aminmax(values)):
            raise ModelError(f"{self._path}: {name} holds values that are not finite (NaN or infinity)")
        if isinstance(weight, Nf4Weight):
            self._digest.update(f"{name} {weight.fingerprint()}".encode())
        else:
            self._digest.update(f"{name} {dtype_name(weight.dtype)} {list(weight.shape)} ".encode())
            raw: Any = weight.reshape(-1).view(torch.uint8).numpy()
            self._digest.update(raw)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class Recorder:
    """Writes weights to the cache's entry. A full disk ends the caching, not the loading; then `error` says why."""

    def __init__(self, writer: Nf4CheckpointWriter) -> None:
        self._writer = writer
        self.error: ModelError | None = None

    def __call__(self, name: str, weight: Served) -> None:
        if self.error is not None:
            return
        try:
            self._writer.add(name if name.startswith("lm_head.") else f"model.{name}", weight)
        except ModelError as error:
            self.error = error
            self._writer.discard()


class Packer:
    """Converts NF4 weights to the provider's own form and writes them to the cache, until the disk is full."""

    def __init__(self, ops: Ops, writer: PackedWriter) -> None:
        self._ops = ops
        self._writer = writer
        self.error: OSError | None = None

    def __call__(self, weight: Nf4Weight) -> Nf4Weight | PackedWeight:
        return self._ops.pack(weight)

    def write(self, name: str, packed: PackedWeight) -> None:
        """Write a packed weight to the cache."""
        if self.error is None:
            try:
                self._writer.add(name, packed)
            except OSError as error:
                self.error = error


class ServedWeights:
    """A `WeightSource`: each weight passes the quantiser, the fingerprint, the recorder, the progress, the packer."""

    def __init__(
        self,
        source: Checkpoint,
        progress: Progress | None,
        recorder: Recorder | None = None,
        packer: Packer | None = None,
        *,
        keep_float32: bool = False,
    ) -> None:
        self._source = source
        self._quantizer = Quantizer(source, keep_float32=keep_float32)
        self._behind: Callable[[Callable[[], None]], None] = _now
        self._fingerprint = Fingerprint(source.path, source.config)
        self._recorder = recorder
        self._packer = packer
        self._tell = progress or _tell_nobody
        # Progress counts values, not bytes: a GGUF file has fewer bytes than its decoded tensors.
        self._done_values = 0
        self._num_values = sum(math.prod(shape) for _, shape in weight_shapes(source.config))
        self.notes: Callable[[], list[str]] = self._quantizer.notes
        self.fingerprint: Callable[[], str] = self._fingerprint.hexdigest

    def matrix(self, name: str, shape: tuple[int, int]) -> Served | PackedWeight:
        weight = self._quantizer.matrix(name, shape)
        self._pass(name, weight)
        if self._packer is None or not isinstance(weight, Nf4Weight):
            return weight
        packed = self._packer(weight)
        if isinstance(packed, PackedWeight):
            self._behind(partial(self._packer.write, name, packed))
        return packed

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._quantizer.tensor(name, shape)
        self._pass(name, tensor)
        return tensor

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Inside, the next weight is read and earlier ones are hashed and written on two other threads.

        An error on those threads is raised when one of the next weights is asked for, or at the end.
        """
        with ThreadPoolExecutor(1, "guanaco-read") as reading, ThreadPoolExecutor(1, "guanaco-write") as writing:
            behind = self._behind = Behind(writing)
            self._quantizer.reader = ReadAhead(self._source, weight_shapes(self._source.config), reading)
            try:
                yield
                behind.finish()
            finally:
                self._behind, self._quantizer.reader = _now, self._source

    def _pass(self, name: str, weight: Served) -> None:
        self._behind(partial(self._fingerprint.add, name, weight))
        if self._recorder is not None:
            self._behind(partial(self._recorder, name, weight))
        self._done_values += math.prod(weight.shape)
        self._tell(name, self._done_values, self._num_values)


class MappedWeights:
    """A `WeightSource` of weights that were packed earlier. Weights without a packed form come from the source."""

    def __init__(self, packed: PackedWeights, served: ServedWeights) -> None:
        self._packed = packed
        self._served = served

    def matrix(self, name: str, shape: tuple[int, int]) -> Served | PackedWeight:
        return self._packed.get(name, shape) or self._served.matrix(name, shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._served.tensor(name, shape)


def _now(function: Callable[[], None]) -> None:
    """Make a call at once."""
    function()


def _tell_nobody(name: str, done: int, total: int) -> None:
    """The progress function of a caller that gave none."""
