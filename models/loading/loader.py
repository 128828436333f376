"""A path → a model that runs: open the checkpoint, quantise dense weights, pack them, build the layers.

Three steps, each of which asks the one below it only if its own cache has nothing: `ensure_packed` (weights in the
provider's form), `ensure_quantized` (an NF4 checkpoint), `load` (the model). On a first start one pass over the weights
fills both caches and builds the model. Knows formats only through `checkpoint`. Called when a server or command starts.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guanaco.kernels import Ops
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.decoder import DecoderModel
from guanaco.models.architectures.registry import build_model
from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import Checkpoint, open_checkpoint
from guanaco.models.loading.model_cache import CachedModel, ModelCache, source_key
from guanaco.models.loading.packed_cache import PackedWeights, PackedWriter, packed_key
from guanaco.models.loading.progress import Progress
from guanaco.models.loading.served_weights import MappedWeights, Packer, Recorder, ServedWeights

# The text that `progress` gets while another process quantises the same model.
WAITING = "waiting for another process that quantises this model"


@dataclass(frozen=True)
class LoadedModel:
    """A model, with its identity, its size and notes for the operator."""

    model: DecoderModel
    config: ModelConfig
    fingerprint: str  # hex SHA-256 of the base: config and every tensor as it is served
    weights_bytes: int  # resident, decoded copies included
    origin: str  # "checkpoint": as stored; "quantized": from dense weights, now; "cache": the same, earlier
    notes: tuple[str, ...]  # for the operator, one line each
    source_notes: tuple[str, ...]  # the notes about the source, which the caches keep; the others are about the caches
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the source's sampling defaults, see `Checkpoint`

    def with_note(self, note: str) -> "LoadedModel":
        """A copy of this model with one more note. The note is not written into any cache."""
        return replace(self, notes=(*self.notes, note))


@dataclass(frozen=True)
class Wanted:
    """What is to be loaded: the open checkpoint, for which provider, and how."""

    source: Checkpoint
    ops: Ops
    cache_dir: Path | None
    progress: Progress | None
    keep_float32: bool

    def served(
        self, source: Checkpoint, packer: Packer | None = None, recorder: Recorder | None = None
    ) -> ServedWeights:
        """The weights of `source` as they are served. source: the checkpoint itself, or its copy in the cache."""
        return ServedWeights(source, self.progress, recorder, packer, keep_float32=self.keep_float32)

    def key(self) -> str:
        """The cache's key for the quantised source."""
        return source_key(self.source.config, self.source.layouts(), keep_float32=self.keep_float32)

    def tell_waiting(self) -> None:
        """Report as progress that another process works on the cache's entry."""
        if self.progress is not None:
            self.progress(WAITING, 0, self.source.num_bytes)


def load_model(
    path: Path,
    ops: Ops,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    keep_float32: bool = False,
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load the model at `path` (see `open_checkpoint`) for the provider `ops`.

    A model with NF4 weights is served as it is stored, including projections that it keeps dense. In a dense model or a
    GGUF file, the projections are quantised to NF4 with double quantisation; the result is cached below `cache_dir`
    unless that is None. progress: called with (tensor, elements done, elements in all). keep_float32: norms, biases,
    embedding and head that are stored in float32 stay float32; otherwise they become bfloat16. max_model_len: the
    longest sequence in tokens; None: the model's own limit. If it exceeds a sliding window, the model is refused.

    Raises ModelError if the model at `path` cannot be served. A cache that cannot be used only makes a note.
    """
    with closing(open_checkpoint(path)) as source:
        source.config.check_window(str(path), max_model_len)
        loaded = ensure_packed(Wanted(source, ops, cache_dir, progress, keep_float32))
        return replace(loaded, notes=(*source.notes, *loaded.notes), sampling=source.sampling)


def ensure_packed(wanted: Wanted) -> LoadedModel:
    """Load the model from the packed weights of an earlier start; if there are none, load it and write them."""
    if wanted.cache_dir is None or not wanted.ops.packed_format:
        return ensure_quantized(wanted)
    cache = ModelCache(wanted.cache_dir)
    try:
        cache.remove_leftovers()
        key = packed_key(wanted.key(), wanted.ops.packed_format)
        (loaded, problem), damaged = cache.ensure(
            key,
            read=lambda entry: _from_packed(wanted, cache, entry),
            make=lambda: _into_packed(wanted, cache, key),
            on_wait=wanted.tell_waiting,
        )
    except OSError as error:
        return _not_packed(ensure_quantized(wanted), error)
    if problem is not None:
        return _not_packed(loaded, problem)
    if damaged is None:
        return loaded
    return loaded.with_note(f"the packed copy {damaged.path} was damaged and was rebuilt")


def ensure_quantized(wanted: Wanted, packer: Packer | None = None) -> LoadedModel:
    """Load the model from the NF4 copy of an earlier start; if there is none, load it and write the copy. packer: packs
    each weight on its way into the model."""
    source = wanted.source
    if source.is_quantized:
        return load(wanted, wanted.served(source, packer), "checkpoint")
    if wanted.cache_dir is None:
        return load(wanted, wanted.served(source, packer), "quantized")
    cache = ModelCache(wanted.cache_dir)
    try:
        cache.remove_leftovers()
        key = wanted.key()
        loaded, damaged = cache.ensure(
            key,
            read=lambda entry: _from_cache(wanted, cache, entry, packer),
            make=lambda: _into_cache(wanted, cache, key, packer),
            on_wait=wanted.tell_waiting,
        )
    except OSError as error:
        return _not_cached(load(wanted, wanted.served(source, packer), "quantized"), error)
    if damaged is None:
        return loaded
    return loaded.with_note(f"the cached copy {damaged.path} was damaged and was rebuilt")


def load(wanted: Wanted, weights: ServedWeights, origin: str) -> LoadedModel:
    """Build the model from `weights`. origin: see `LoadedModel`."""
    with weights.overlapped():
        model = build_model(wanted.source.config, weights, wanted.ops)
    fingerprint, notes = weights.fingerprint(), tuple(weights.notes())
    return LoadedModel(model, model.config, fingerprint, model.weights_bytes, origin, notes, notes)


_Packed = tuple[LoadedModel, OSError | None]  # the model, and why its packed weights are not kept


def _from_packed(wanted: Wanted, cache: ModelCache, entry: CachedModel) -> _Packed | None:
    """The model from its packed weights; None if these are not byte for byte as they were written."""
    if not entry.fingerprint:
        return None
    try:
        weights = MappedWeights(PackedWeights(entry.path), wanted.served(wanted.source))
    except ModelError:
        return None
    model = build_model(wanted.source.config, weights, wanted.ops)
    cache.touch(entry)
    return _from_entry(model, entry), None


def _into_packed(wanted: Wanted, cache: ModelCache, key: str) -> _Packed:
    writer = PackedWriter(cache, key)
    packer = Packer(wanted.ops, writer)
    try:
        made = ensure_quantized(wanted, packer)
        if packer.error is None and writer.num_tensors:
            try:
                writer.seal(source=wanted.source.path, fingerprint=made.fingerprint, notes=made.source_notes)
            except OSError as error:
                return made, error
    finally:
        writer.discard()
    return made, packer.error


def _from_cache(wanted: Wanted, cache: ModelCache, entry: CachedModel, packer: Packer | None) -> LoadedModel | None:
    """The model from its NF4 copy; None if the copy is not byte for byte as it was written."""
    try:
        with closing(open_checkpoint(entry.path)) as cached:
            weights = wanted.served(cached, packer)
            model = build_model(wanted.source.config, weights, wanted.ops)
    except ModelError:
        return None
    if weights.fingerprint() != entry.fingerprint:
        return None
    cache.touch(entry)
    return _from_entry(model, entry)


def _into_cache(wanted: Wanted, cache: ModelCache, key: str, packer: Packer | None) -> LoadedModel:
    """Quantise the model and write it to the cache. If the disk is full, the model is served without the copy."""
    source = wanted.source
    try:
        writer = cache.writer(key, source.config.to_json())
    except ModelError as error:
        return _not_cached(load(wanted, wanted.served(source, packer), "quantized"), error)
    recorder = Recorder(writer)
    try:
        loaded = load(wanted, wanted.served(source, packer, recorder), "quantized")
    except BaseException:
        writer.discard()
        raise
    if recorder.error is not None:
        return _not_cached(loaded, recorder.error)
    try:
        cache.seal(writer, source=source.path, fingerprint=loaded.fingerprint, notes=loaded.source_notes)
    except (ModelError, OSError) as error:
        writer.discard()
        return _not_cached(loaded, error)
    return loaded


def _from_entry(model: DecoderModel, entry: CachedModel) -> LoadedModel:
    return LoadedModel(
        model, model.config, entry.fingerprint, model.weights_bytes, "cache", entry.notes, source_notes=entry.notes
    )


def _not_cached(loaded: LoadedModel, error: Exception) -> LoadedModel:
    return loaded.with_note(f"the quantised model is not cached and will be quantised again next time: {error}")


def _not_packed(loaded: LoadedModel, error: Exception) -> LoadedModel:
    return loaded.with_note(f"the packed weights are not cached and will be packed again next time: {error}")
