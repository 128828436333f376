"""From a path to a model that runs: open the checkpoint, quantise what is dense, cache the result, build the layers.

Weights stream through one by one, so that no more than the finished model and one tensor is in memory. Knows formats
only through `checkpoint`. Called by the server's wiring.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from guanaco.kernels import Ops, PackedWeight
from guanaco.kernels.nf4 import Nf4Weight, dtype_name
from guanaco.models.architectures.config import LlamaConfig
from guanaco.models.architectures.llama import LlamaModel
from guanaco.models.errors import ModelError
from guanaco.models.formats.shown import listed
from guanaco.models.loading.checkpoint import Checkpoint, open_checkpoint
from guanaco.models.loading.model_cache import CachedModel, ModelCache, source_key
from guanaco.models.loading.packed_cache import PackedWeights, PackedWriter, packed_key
from guanaco.models.loading.quantize import (
    Nf4CheckpointWriter,
    Progress,
    dense_tensor,
    is_projection,
    quantize_tensor,
    weight_shapes,
)

Weight = TypeVar("Weight", Nf4Weight, Tensor)

# What `progress` is told while another process quantises the same model.
WAITING = "waiting for another process that quantises this model"


@dataclass(frozen=True)
class LoadedModel:
    """A model and what there is to say about it."""

    model: LlamaModel
    config: LlamaConfig
    fingerprint: str  # hex SHA-256 of what the base computes with: config and every tensor as it is served
    weights_bytes: int  # resident, decoded copies included
    origin: str  # "checkpoint": as stored; "quantized": from dense weights, now; "cache": the same, earlier
    notes: tuple[str, ...]  # remarks for the operator, a line each
    source_notes: tuple[str, ...]  # those of them that the caches keep: on the source, not on the caches


@dataclass(frozen=True)
class _How:
    """What a load was asked for besides the model."""

    progress: Progress | None
    keep_float32: bool

    def served(
        self, source: Checkpoint, writer: Nf4CheckpointWriter | None = None, packer: "Packer | None" = None
    ) -> "ServedWeights":
        return ServedWeights(source, self.progress, writer, packer, keep_float32=self.keep_float32)

    def key(self, source: Checkpoint) -> str:
        return source_key(source.config, source.layouts(), keep_float32=self.keep_float32)


def load_model(
    path: Path,
    ops: Ops,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    keep_float32: bool = False,
) -> LoadedModel:
    """Load the model at `path` (see `open_checkpoint`) for the provider `ops`.

    A model with NF4 weights is served as it is stored, including projections that it keeps dense. A dense one (or a
    GGUF) has its projections quantised to NF4 with double quantisation, and is cached below `cache_dir` unless that is
    None. progress: called with (tensor, bytes done, bytes in all). keep_float32: norms, biases, embedding and head
    that are stored in float32 stay so, and become bfloat16 otherwise. Raises ModelError for what is wrong with `path`;
    a cache that cannot be used is no error but a note.
    """
    how = _How(progress, keep_float32)
    with closing(open_checkpoint(path)) as source:
        loaded = _load_source(source, ops, cache_dir, how)
        return replace(loaded, notes=(*source.notes, *loaded.notes))


def _load_source(source: Checkpoint, ops: Ops, cache_dir: Path | None, how: _How) -> LoadedModel:
    if cache_dir is None or not ops.packed_format:
        return _load_unpacked(source, ops, cache_dir, how, None)
    try:
        ModelCache(cache_dir).remove_leftovers()
        return _load_packed(source, ops, cache_dir, how)
    except OSError as error:
        return _not_packed(_load_unpacked(source, ops, cache_dir, how, None), error)


def _load_unpacked(
    source: Checkpoint, ops: Ops, cache_dir: Path | None, how: _How, packer: "Packer | None"
) -> LoadedModel:
    if source.is_quantized:
        return _build(source, how.served(source, packer=packer), ops, "checkpoint")
    if cache_dir is None:
        return _build(source, how.served(source, packer=packer), ops, "quantized")
    try:
        cache = ModelCache(cache_dir)
        cache.remove_leftovers()
        return _load_through_cache(source, ops, cache, how, packer)
    except OSError as error:
        return _not_cached(_build(source, how.served(source, packer=packer), ops, "quantized"), error)


class Packer:
    """Gives NF4 weights the provider's own form, and keeps that on disk as long as the disk takes it."""

    def __init__(self, ops: Ops, writer: PackedWriter) -> None:
        self._ops = ops
        self._writer = writer
        self.error: OSError | None = None

    def __call__(self, name: str, weight: Nf4Weight) -> Nf4Weight | PackedWeight:
        packed = self._ops.pack(weight)
        if isinstance(packed, PackedWeight) and self.error is None:
            try:
                self._writer.add(name, packed)
            except OSError as error:
                self.error = error
        return packed


class ServedWeights:
    """A `WeightSource` between checkpoint and model: quantises what is dense, checks, fingerprints, feeds the cache."""

    def __init__(
        self,
        source: Checkpoint,
        progress: Progress | None,
        writer: Nf4CheckpointWriter | None = None,
        packer: Packer | None = None,
        *,
        keep_float32: bool = False,
    ) -> None:
        self._source = source
        self._progress = progress
        self._writer = writer
        self._packer = packer
        self._keep_float32 = keep_float32
        self._num_rounded = 0
        # Values, not bytes: a GGUF file has fewer bytes than the tensors that come out of it.
        self._done_values = 0
        self._num_values = sum(math.prod(shape) for _, shape in weight_shapes(source.config))
        self._num_dense_projections = 0
        self._digest = hashlib.sha256(json.dumps(source.config.computation(), sort_keys=True).encode())
        self.write_error: ModelError | None = None

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | PackedWeight | Tensor:
        weight = self._source.matrix(name, shape)
        if isinstance(weight, Nf4Weight):
            return self._packed(name, self._passed(name, weight))
        if not self._source.is_quantized and is_projection(name):
            with self._naming_source():
                quantized = quantize_tensor(name, weight)
            return self._packed(name, self._passed(name, quantized))
        self._num_dense_projections += is_projection(name)
        return self._passed(name, self._dense(name, weight))

    def _packed(self, name: str, weight: Nf4Weight) -> Nf4Weight | PackedWeight:
        return weight if self._packer is None else self._packer(name, weight)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._source.tensor(name, shape)
        return self._passed(name, self._dense(name, stored))

    def fingerprint(self) -> str:
        """Of everything that has passed."""
        return self._digest.hexdigest()

    def notes(self) -> list[str]:
        """What the source had that is remarkable. Complete once the model is built."""
        notes = []
        if unused := self._source.unused():
            notes.append(f"{len(unused)} tensors are not part of this LLaMA and were ignored: {listed(unused)}")
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
        """Say which model it was in refusals that only know the tensor."""
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{self._source.path}: {error}") from error

    def _passed(self, name: str, weight: Weight) -> Weight:
        values = weight.scales() if isinstance(weight, Nf4Weight) else weight
        if not all(torch.isfinite(bound) for bound in torch.aminmax(values)):
            raise ModelError(f"{self._source.path}: {name} holds values that are not finite (NaN or infinity)")
        if isinstance(weight, Nf4Weight):
            self._digest.update(f"{name} {weight.fingerprint()}".encode())
        else:
            self._digest.update(f"{name} {dtype_name(weight.dtype)} {list(weight.shape)} ".encode())
            raw: Any = weight.reshape(-1).view(torch.uint8).numpy()
            self._digest.update(raw)
        self._write(name, weight)
        self._done_values += math.prod(weight.shape)
        if self._progress is not None:
            self._progress(name, self._done_values, self._num_values)
        return weight

    def _write(self, name: str, weight: Nf4Weight | Tensor) -> None:
        """To the cache. A full disk ends the caching, not the loading."""
        if self._writer is None or self.write_error is not None:
            return
        try:
            self._writer.add(name if name.startswith("lm_head.") else f"model.{name}", weight)
        except ModelError as error:
            self.write_error = error
            self._writer.discard()


class _MappedWeights:
    """A `WeightSource` of weights that were packed earlier; what has no packed form comes from the source."""

    def __init__(self, packed: PackedWeights, served: ServedWeights) -> None:
        self._packed = packed
        self._served = served

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | PackedWeight | Tensor:
        return self._packed.get(name, shape) or self._served.matrix(name, shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._served.tensor(name, shape)


def _load_packed(source: Checkpoint, ops: Ops, cache_dir: Path, how: _How) -> LoadedModel:
    """From the packed weights of an earlier start, or leaving them behind for the next. Raises OSError where the cache
    cannot be used."""
    cache = ModelCache(cache_dir)
    key = packed_key(how.key(source), ops.packed_format)

    def load(entry: CachedModel | None) -> LoadedModel | None:
        if entry is None or not entry.fingerprint:
            return None
        try:
            weights = _MappedWeights(PackedWeights(entry.path), how.served(source))
        except ModelError:
            return None
        model = LlamaModel(source.config, weights, ops)
        cache.touch(entry)
        return _from_entry(model, entry)

    with cache.lock(key, exclusive=False, on_wait=_waiting(source, how)):
        if loaded := load(cache.find(key)):
            return loaded
    with cache.lock(key, exclusive=True, on_wait=_waiting(source, how)):
        entry = cache.find(key)  # between the two locks another process may have made it
        if loaded := load(entry):
            return loaded
        writer = PackedWriter(cache, key)
        packer = Packer(ops, writer)
        try:
            made = _load_unpacked(source, ops, cache_dir, how, packer)
            if packer.error is None and writer.num_tensors:
                packer.error = _seal(writer, source, made)
        finally:
            writer.discard()
    if packer.error is not None:
        return _not_packed(made, packer.error)
    return made if entry is None else _with_note(made, f"the packed copy {entry.path} was damaged and was rebuilt")


def _seal(writer: PackedWriter, source: Checkpoint, loaded: LoadedModel) -> OSError | None:
    try:
        writer.seal(source=source.path, fingerprint=loaded.fingerprint, notes=loaded.source_notes)
    except OSError as error:
        return error
    return None


def _waiting(source: Checkpoint, how: _How) -> Callable[[], None]:
    def tell() -> None:
        if how.progress is not None:
            how.progress(WAITING, 0, source.num_bytes)

    return tell


def _load_through_cache(
    source: Checkpoint, ops: Ops, cache: ModelCache, how: _How, packer: Packer | None
) -> LoadedModel:
    key = how.key(source)
    with cache.lock(key, exclusive=False, on_wait=_waiting(source, how)):
        entry = cache.find(key)
        if entry is not None and (loaded := _from_cache(source, ops, cache, entry, how, packer)):
            return loaded
    with cache.lock(key, exclusive=True, on_wait=_waiting(source, how)):
        entry = cache.find(key)  # between the two locks another process may have made it
        if entry is not None and (loaded := _from_cache(source, ops, cache, entry, how, packer)):
            return loaded
        loaded = _into_cache(source, ops, cache, key, how, packer)
    return loaded if entry is None else _with_note(loaded, f"the cached copy {entry.path} was damaged and was rebuilt")


def _from_cache(
    source: Checkpoint,
    ops: Ops,
    cache: ModelCache,
    entry: CachedModel,
    how: _How,
    packer: Packer | None,
) -> LoadedModel | None:
    """The model from its cached form, or None if that is not, byte for byte, what was written."""
    try:
        with closing(open_checkpoint(entry.path)) as cached:
            weights = how.served(cached, packer=packer)
            model = LlamaModel(source.config, weights, ops)
    except ModelError:
        return None
    if weights.fingerprint() != entry.fingerprint:
        return None
    cache.touch(entry)
    return _from_entry(model, entry)


def _into_cache(
    source: Checkpoint, ops: Ops, cache: ModelCache, key: str, how: _How, packer: Packer | None
) -> LoadedModel:
    """Quantise, and write what passes to the cache; if the disk does not take it, the model is served all the same."""
    try:
        writer = cache.writer(key, source.config.to_json())
    except ModelError as error:
        return _not_cached(_build(source, how.served(source, packer=packer), ops, "quantized"), error)
    weights = how.served(source, writer, packer)
    try:
        loaded = _build(source, weights, ops, "quantized")
    except BaseException:
        writer.discard()
        raise
    if weights.write_error is not None:
        return _not_cached(loaded, weights.write_error)
    try:
        cache.seal(writer, source=source.path, fingerprint=loaded.fingerprint, notes=loaded.source_notes)
    except (ModelError, OSError) as error:
        writer.discard()
        return _not_cached(loaded, error)
    return loaded


def _build(source: Checkpoint, weights: ServedWeights, ops: Ops, origin: str) -> LoadedModel:
    model = LlamaModel(source.config, weights, ops)
    fingerprint, notes = weights.fingerprint(), tuple(weights.notes())
    return LoadedModel(model, source.config, fingerprint, model.weights_bytes, origin, notes, notes)


def _from_entry(model: LlamaModel, entry: CachedModel) -> LoadedModel:
    return LoadedModel(
        model, model.config, entry.fingerprint, model.weights_bytes, "cache", entry.notes, source_notes=entry.notes
    )


def _not_cached(loaded: LoadedModel, error: Exception) -> LoadedModel:
    return _with_note(loaded, f"the quantised model is not cached and will be quantised again next time: {error}")


def _not_packed(loaded: LoadedModel, error: Exception) -> LoadedModel:
    return _with_note(loaded, f"the packed weights are not cached and will be packed again next time: {error}")


def _with_note(loaded: LoadedModel, note: str) -> LoadedModel:
    return replace(loaded, notes=(*loaded.notes, note))
