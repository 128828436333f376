"""Packed weights on disk: the second start maps them, a damaged copy is never served, a full disk is only a note."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guanaco.kernels.nf4 import GROUP_SIZE
from guanaco.models.architectures.config_json import read_config
from guanaco.models.loading import packed_cache
from guanaco.models.loading.checkpoint import SafetensorsCheckpoint
from guanaco.models.loading.loader import LoadedModel, load_model
from guanaco.models.loading.model_cache import MANIFEST, list_cached_models, prune_cached_models
from guanaco.models.loading.packed_cache import WEIGHTS, PackedWriter
from guanaco.models.loading.quantize import is_projection
from support.kernels.providers import PROVIDERS, provider_ops
from support.models.oracles import PagedRun, reference_ops, relative_error
from support.models.tiny_models import make_tiny_llama

NATIVE = [name for name in PROVIDERS if name.startswith("cpu")]
IDS = [5, 9, 300, 17, 44]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make_tiny_llama(root / "nf4", quantized=True)
    make_tiny_llama(root / "dense")
    make_tiny_llama(root / "odd", kind="odd")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(path: Path, cache: Path | None, provider: str = NATIVE[0]) -> LoadedModel:
    return load_model(path, provider_ops(provider), cache_dir=cache)


def logits(loaded: LoadedModel) -> Tensor:
    return PagedRun(loaded.model).step([(0, IDS)], every_row=True)


def packed_entry(cache: Path) -> Path:
    (path,) = (entry.path for entry in list_cached_models(cache) if (entry.path / WEIGHTS).exists())
    return path


@pytest.mark.parametrize("kind", ["nf4", "dense", "odd"])
def test_the_second_start_maps_what_the_first_left(
    kind: str, originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = originals / kind
    first = load(path, cache)
    read: list[tuple[str, int]] = []
    original = SafetensorsCheckpoint.matrix

    def spy(self: Any, name: str, shape: tuple[int, int]) -> Any:
        read.append((name, shape[1]))
        return original(self, name, shape)

    monkeypatch.setattr(SafetensorsCheckpoint, "matrix", spy)
    second = load(path, cache)
    config = read_config(path)
    again = [name for name, in_features in read if is_projection(name, config) and in_features % GROUP_SIZE == 0]
    assert not again, "only rows that groups cross come from the source again"
    assert second.origin == "cache"
    assert (second.fingerprint, second.notes) == (first.fingerprint, first.notes)
    assert second.weights_bytes == first.weights_bytes
    assert torch.equal(logits(second), logits(first))
    assert torch.equal(logits(second), logits(load(path, None)))


def test_every_isa_of_one_order_shares_them(originals: Path, cache: Path) -> None:
    results = [logits(load(originals / "nf4", cache, name)) for name in NATIVE]
    orders = {provider_ops(name).packed_format for name in NATIVE}  # AVX-512's is another one than AVX2's
    assert len(list_cached_models(cache)) == len(orders)
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-3  # a rounding of an activation may fall the other way


def test_the_reference_packs_nothing(originals: Path, cache: Path) -> None:
    load_model(originals / "nf4", reference_ops(), cache_dir=cache)
    assert list_cached_models(cache) == []


def flip(offset: int) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        content = bytearray((entry / WEIGHTS).read_bytes())
        content[offset % len(content)] ^= 1
        (entry / WEIGHTS).write_bytes(content)

    return damage


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda entry: (entry / name).write_text(text) and None


@pytest.mark.parametrize(
    "damage",
    [
        flip(0),
        flip(5000),
        flip(-1),
        lambda entry: (entry / WEIGHTS).write_bytes((entry / WEIGHTS).read_bytes()[:-4096]) and None,
        lambda entry: (entry / WEIGHTS).write_bytes(b"") and None,
        lambda entry: (entry / WEIGHTS).unlink(),
        lambda entry: (entry / MANIFEST).unlink(),
        _write(MANIFEST, "{"),
        _write(MANIFEST, '{"format": "guanaco nf4 cache 1", "fingerprint": "00", "tensors": {"x": {}}}'),
        _write(MANIFEST, '{"format": "guanaco nf4 cache 1", "fingerprint": "00", "tensors": []}'),
    ],
)
def test_a_damaged_copy_is_rebuilt(damage: Callable[[Path], None], originals: Path, cache: Path) -> None:
    first = load(originals / "nf4", cache)
    expected, entry = logits(first), packed_entry(cache)
    damage(entry)
    second = load(originals / "nf4", cache)
    assert torch.equal(logits(second), expected)
    assert second.fingerprint == first.fingerprint
    assert any("was damaged and was rebuilt" in note for note in second.notes)
    third = load(originals / "nf4", cache)
    assert (third.origin, third.notes) == ("cache", first.notes)


@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("where", ["__init__", "add", "seal"])
def test_a_full_disk_is_a_note(
    kind: str, where: str, originals: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load(originals / kind, None))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PackedWriter, where, full)
        loaded = load(originals / kind, cache)
    assert torch.equal(logits(loaded), expected)
    assert sum("No space left" in note for note in loaded.notes) == 1
    assert not [p for p in (cache / "models").iterdir() if "partial" in p.name]
    again = load(originals / kind, cache)
    assert not any("No space left" in note for note in again.notes), "what was wrong once is not remembered"
    assert torch.equal(logits(load(originals / kind, cache)), expected)


def test_a_changed_source_is_not_found(originals: Path, cache: Path, tmp_path: Path) -> None:
    first = load(originals / "nf4", cache)
    path = make_tiny_llama(tmp_path / "other", quantized=True, seed=1)
    assert load(path, cache).fingerprint != first.fingerprint
    assert load(path, cache).origin == "cache"
    assert len(list_cached_models(cache)) == 2


def test_what_a_process_that_died_left_goes_with_the_next_attempt(originals: Path, cache: Path) -> None:
    load(originals / "nf4", cache)
    entry = packed_entry(cache)
    shutil.move(entry, entry.parent / f".{entry.name}.partial-dead")
    load(originals / "nf4", cache)
    assert [p.name for p in (cache / "models").iterdir() if "partial" in p.name] == []


def test_pruning_takes_them_too_and_does_not_disturb_who_uses_them(originals: Path, cache: Path) -> None:
    load(originals / "nf4", cache)
    loaded = load(originals / "nf4", cache)
    before = logits(loaded)
    deleted, busy = prune_cached_models(cache)
    assert len(deleted) == 1
    assert not busy
    assert "packed" in deleted[0].source
    assert torch.equal(logits(loaded), before), "a map outlives its file's name"


def test_tensors_lie_on_pages(originals: Path, cache: Path) -> None:
    load(originals / "nf4", cache)
    packed = packed_cache.PackedWeights(packed_entry(cache))
    assert {weight.data.data_ptr() % 4096 for weight in packed._weights.values()} == {0}
