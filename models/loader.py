"""From a path to a model that runs: open the checkpoint, quantise what is dense, cache the result, build the layers.

Weights stream through one by one, so that no more than the finished model and one tensor is in memory. Knows formats
only through `checkpoint`. Called by the server's wiring.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from guanaco.kernels import Ops
from guanaco.kernels.nf4 import Nf4Weight, dtype_name
from guanaco.models.checkpoint import Checkpoint, open_checkpoint
from guanaco.models.config import LlamaConfig
from guanaco.models.errors import ModelError
from guanaco.models.llama import LlamaModel
from guanaco.models.model_cache import CachedModel, ModelCache, source_key
from guanaco.models.quantize import Nf4CheckpointWriter, Progress, dense_tensor, is_projection, quantize_tensor

Weight = TypeVar("Weight", Nf4Weight, Tensor)

# What `progress` is told while another process quantises the same model.
WAITING = "waiting for another process that quantises this model"
_MAX_LISTED = 5


@dataclass(frozen=True)
class LoadedModel:
    """A model and what there is to say about it."""

    model: LlamaModel
    config: LlamaConfig
    fingerprint: str  # hex SHA-256 of what the base computes with: config and every tensor as it is served
    weights_bytes: int  # resident, decoded copies included
    origin: str  # "checkpoint": as stored; "quantized": from dense weights, now; "cache": the same, earlier
    notes: tuple[str, ...]  # remarks for the operator, a line each


def load_model(path: Path, ops: Ops, *, cache_dir: Path | None = None, progress: Progress | None = None) -> LoadedModel:
    """Load the model at `path` (see `open_checkpoint`) for the provider `ops`.

    A model with NF4 weights is served as it is stored, including projections that it keeps dense. A dense one (or a
    GGUF) has its projections quantised to NF4 with double quantisation, and is cached below `cache_dir` unless that is
    None. progress: called with (tensor, bytes done, bytes in all). Raises ModelError for what is wrong with `path`; a
    cache that cannot be used is no error but a note.
    """
    with closing(open_checkpoint(path)) as source:
        if source.is_quantized:
            return _build(source, ServedWeights(source, progress), ops, "checkpoint")
        if cache_dir is None:
            return _build(source, ServedWeights(source, progress), ops, "quantized")
        try:
            return _load_through_cache(source, ops, ModelCache(cache_dir), progress)
        except OSError as error:
            return _not_cached(_build(source, ServedWeights(source, progress), ops, "quantized"), error)


class ServedWeights:
    """A `WeightSource` between checkpoint and model: quantises what is dense, checks, fingerprints, feeds the cache."""

    def __init__(
        self, source: Checkpoint, progress: Progress | None, writer: Nf4CheckpointWriter | None = None
    ) -> None:
        self._source = source
        self._progress = progress
        self._writer = writer
        self._done_bytes = 0
        self._num_dense_projections = 0
        self._digest = hashlib.sha256(json.dumps(source.config.computation(), sort_keys=True).encode())
        self.write_error: ModelError | None = None

    def matrix(self, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor:
        weight = self._source.matrix(name, shape)
        if isinstance(weight, Nf4Weight):
            return self._passed(name, weight, weight.num_bytes)
        if not self._source.is_quantized and is_projection(name):
            with self._naming_source():
                return self._passed(name, quantize_tensor(name, weight), weight.nbytes)
        self._num_dense_projections += is_projection(name)
        return self._passed(name, self._dense(name, weight), weight.nbytes)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._source.tensor(name, shape)
        return self._passed(name, self._dense(name, stored), stored.nbytes)

    def fingerprint(self) -> str:
        """Of everything that has passed."""
        return self._digest.hexdigest()

    def notes(self) -> list[str]:
        """What the source had that is remarkable. Complete once the model is built."""
        notes = []
        if unused := self._source.unused():
            listed = ", ".join(unused[:_MAX_LISTED]) + (", …" if len(unused) > _MAX_LISTED else "")
            notes.append(f"{len(unused)} tensors are not part of this LLaMA and were ignored: {listed}")
        if self._num_dense_projections:
            notes.append(f"{self._num_dense_projections} projections are dense in the checkpoint and are served so")
        return notes

    def _dense(self, name: str, tensor: Tensor) -> Tensor:
        if self._source.is_quantized:
            return tensor
        with self._naming_source():
            return dense_tensor(name, tensor)

    @contextmanager
    def _naming_source(self) -> Iterator[None]:
        """Say which model it was in refusals that only know the tensor."""
        try:
            yield
        except ModelError as error:
            raise ModelError(f"{self._source.path}: {error}") from error

    def _passed(self, name: str, weight: Weight, source_bytes: int) -> Weight:
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
        self._done_bytes += source_bytes
        if self._progress is not None:
            self._progress(name, self._done_bytes, self._source.num_bytes)
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


def _load_through_cache(source: Checkpoint, ops: Ops, cache: ModelCache, progress: Progress | None) -> LoadedModel:
    key = source_key(source.config, source.layouts())

    def tell_of_waiting() -> None:
        if progress is not None:
            progress(WAITING, 0, source.num_bytes)

    with cache.lock(key, exclusive=False, on_wait=tell_of_waiting):
        entry = cache.find(key)
        if entry is not None and (loaded := _from_cache(source, ops, cache, entry, progress)):
            return loaded
    with cache.lock(key, exclusive=True, on_wait=tell_of_waiting):
        entry = cache.find(key)  # between the two locks another process may have made it
        if entry is not None and (loaded := _from_cache(source, ops, cache, entry, progress)):
            return loaded
        loaded = _into_cache(source, ops, cache, key, progress)
    return loaded if entry is None else _with_note(loaded, f"the cached copy {entry.path} was damaged and was rebuilt")


def _from_cache(
    source: Checkpoint, ops: Ops, cache: ModelCache, entry: CachedModel, progress: Progress | None
) -> LoadedModel | None:
    """The model from its cached form, or None if that is not, byte for byte, what was written."""
    try:
        with closing(open_checkpoint(entry.path)) as cached:
            weights = ServedWeights(cached, progress)
            model = LlamaModel(source.config, weights, ops)
    except ModelError:
        return None
    if weights.fingerprint() != entry.fingerprint:
        return None
    cache.touch(entry)
    return LoadedModel(model, source.config, entry.fingerprint, model.weights_bytes, "cache", entry.notes)


def _into_cache(source: Checkpoint, ops: Ops, cache: ModelCache, key: str, progress: Progress | None) -> LoadedModel:
    """Quantise, and write what passes to the cache; if the disk does not take it, the model is served all the same."""
    try:
        writer = cache.writer(key, source.config.to_json())
    except ModelError as error:
        return _not_cached(_build(source, ServedWeights(source, progress), ops, "quantized"), error)
    weights = ServedWeights(source, progress, writer)
    try:
        loaded = _build(source, weights, ops, "quantized")
    except BaseException:
        writer.discard()
        raise
    if weights.write_error is not None:
        return _not_cached(loaded, weights.write_error)
    try:
        cache.seal(writer, source=source.path, fingerprint=loaded.fingerprint, notes=loaded.notes)
    except (ModelError, OSError) as error:
        writer.discard()
        return _not_cached(loaded, error)
    return loaded


def _build(source: Checkpoint, weights: ServedWeights, ops: Ops, origin: str) -> LoadedModel:
    model = LlamaModel(source.config, weights, ops)
    fingerprint, notes = weights.fingerprint(), tuple(weights.notes())
    return LoadedModel(model, source.config, fingerprint, model.weights_bytes, origin, notes)


def _not_cached(loaded: LoadedModel, error: Exception) -> LoadedModel:
    return _with_note(loaded, f"the quantised model is not cached and will be quantised again next time: {error}")


def _with_note(loaded: LoadedModel, note: str) -> LoadedModel:
    return replace(loaded, notes=(*loaded.notes, note))
