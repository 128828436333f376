"""The cache of quantised models: found again, never trusted blindly, never in the way."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guanaco.models.errors import ModelError
from guanaco.models.loading.loader import WAITING, LoadedModel, load_model
from guanaco.models.loading.model_cache import (
    MANIFEST,
    ModelCache,
    list_cached_models,
    prune_cached_models,
)
from support.children import IMPORTABLE
from support.models.oracles import PagedRun, reference_ops
from support.models.tiny_models import make_tiny_llama

# Half of these tables' entries, and the spelling of the state's JSON, need not matter to any weight of a small model.
UNUSED_PARTS = (".nested_quant_map", ".bitsandbytes__nf4")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make_tiny_llama(root / "dense")
    make_tiny_llama(root / "other", seed=1)
    make_tiny_llama(root / "nf4", quantized=True)
    return root


@pytest.fixture
def model(originals: Path, tmp_path: Path) -> Path:
    """A copy of a dense model that a test may change."""
    return Path(shutil.copytree(originals / "dense", tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(path: Path, cache: Path | None) -> LoadedModel:
    return load_model(path, reference_ops(), cache_dir=cache)


def only_entry(cache: Path) -> Path:
    (entry,) = list_cached_models(cache)
    return entry.path


def test_the_second_time_it_comes_from_the_cache_and_is_the_same(model: Path, cache: Path) -> None:
    first, second = load(model, cache), load(model, cache)
    assert (first.origin, second.origin) == ("quantized", "cache")
    assert second.fingerprint == first.fingerprint == load(model, None).fingerprint
    assert second.weights_bytes == first.weights_bytes
    assert second.config == first.config
    logits = [PagedRun(m.model).step([(0, [5, 6, 7, 300])], every_row=True) for m in (first, second)]
    assert torch.equal(*logits)


def test_remarks_about_the_source_are_remembered(model: Path, cache: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "extra": torch.ones(1)}, model / "model.safetensors")
    first, second = load(model, cache), load(model, cache)
    assert second.origin == "cache"
    assert second.notes == first.notes != ()


def test_without_a_cache_nothing_is_written(model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert load(model, None).origin == "quantized"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_is_quantised_already_is_not_cached(originals: Path, cache: Path) -> None:
    assert load(originals / "nf4", cache).origin == "checkpoint"
    assert list_cached_models(cache) == []


def test_a_model_that_moves_is_recognised(model: Path, cache: Path, tmp_path: Path) -> None:
    load(model, cache)
    assert load(model.rename(tmp_path / "elsewhere"), cache).origin == "cache"


class TestSourceChanges:
    """The key must change whenever the weights do."""

    def test_other_weights_of_the_same_shape_in_the_same_place(self, model: Path, originals: Path, cache: Path) -> None:
        before = load(model, cache)
        shutil.copyfile(originals / "other" / "model.safetensors", model / "model.safetensors")
        after = load(model, cache)
        assert after.origin == "quantized"
        assert after.fingerprint != before.fingerprint
        assert len(list_cached_models(cache)) == 2

    def test_a_rewrite_alone(self, model: Path, cache: Path) -> None:
        load(model, cache)
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
        assert load(model, cache).origin == "quantized"

    @pytest.mark.parametrize("place", [0, 0.5, -1])
    def test_one_patched_tensor_with_the_time_put_back(self, place: float, model: Path, cache: Path) -> None:
        load(model, cache)
        file = model / "model.safetensors"
        status, tensors = file.stat(), load_file(file)
        flat = tensors["model.layers.1.mlp.gate_proj.weight"].view(-1)
        flat[int(place * len(flat)) if place >= 0 else -1] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_size == status.st_size
        assert load(model, cache).origin == "quantized"

    def test_a_config_that_computes_something_else(self, model: Path, cache: Path) -> None:
        load(model, cache)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 3]}))
        same = load(model, cache)
        assert (same.origin, same.config.eos_token_ids) == ("cache", (2, 3))
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
        assert load(model, cache).origin == "quantized"


class TestDamage:
    """What was written only in part, or changed afterwards, is rebuilt."""

    def rebuilt(self, model: Path, cache: Path) -> None:
        expected = load(model, None)
        loaded = load(model, cache)
        assert loaded.origin == "quantized"
        assert loaded.fingerprint == expected.fingerprint
        assert any("was damaged and was rebuilt" in note for note in loaded.notes)
        assert load(model, cache).origin == "cache"
        assert len(list_cached_models(cache)) == 1

    @pytest.mark.parametrize("name", [MANIFEST, "config.json", "model.safetensors"])
    def test_a_missing_file(self, name: str, model: Path, cache: Path) -> None:
        load(model, cache)
        (only_entry(cache) / name).unlink()
        self.rebuilt(model, cache)

    @pytest.mark.parametrize("name", [MANIFEST, "config.json", "model.safetensors"])
    def test_a_truncated_file(self, name: str, model: Path, cache: Path) -> None:
        load(model, cache)
        os.truncate(only_entry(cache) / name, (only_entry(cache) / name).stat().st_size // 2)
        self.rebuilt(model, cache)

    def test_a_flipped_bit_in_any_tensor(self, model: Path, cache: Path) -> None:
        """Of codes, scales, norms and tables alike."""
        load(model, cache)
        file = only_entry(cache) / "model.safetensors"
        whole = load_file(file)
        expected = load(model, None).fingerprint
        for name in (name for name in whole if ".layers.1." not in name):
            damaged = {key: tensor.clone() for key, tensor in whole.items()}
            raw = damaged[name].view(-1).view(torch.uint8)
            raw[len(raw) // 2] ^= 1
            save_file(damaged, file)
            loaded = load(model, cache)
            assert loaded.fingerprint == expected, name
            assert loaded.origin == "quantized" or name.endswith(UNUSED_PARTS), name

    def test_the_manifest_of_another_version(self, model: Path, cache: Path) -> None:
        load(model, cache)
        path = only_entry(cache) / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": "guanaco nf4 cache 0"}))
        self.rebuilt(model, cache)

    def test_a_process_that_died_while_it_wrote(self, model: Path, cache: Path) -> None:
        support = str(IMPORTABLE)
        script = f"""
import os, sys
sys.path.insert(0, {support!r})
from pathlib import Path
from support.models.oracles import reference_ops
from guanaco.models.loading import model_cache
from guanaco.models.loading.loader import load_model
model_cache.SHARD_BYTES = 1  # write at every tensor
def die(name, done, total):
    if name == "norm.weight":
        os._exit(9)
load_model(Path({str(model)!r}), reference_ops(), cache_dir=Path({str(cache)!r}), progress=die)
"""
        result = subprocess.run([sys.executable, "-c", script], cwd=model, timeout=120, check=False)
        assert result.returncode == 9
        left = list((cache / "models").glob(".*.partial-*"))
        assert len(left) == 1
        assert list(left[0].glob("shard-*.safetensors"))
        assert list_cached_models(cache) == []
        assert load(model, cache).origin == "quantized"
        assert not left[0].exists()
        assert load(model, cache).origin == "cache"


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond so many bytes fails, in this process, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestNoRoom:
    """A cache that cannot be written is a remark, not an error."""

    def served(self, loaded: LoadedModel, model: Path) -> str:
        assert loaded.origin == "quantized"
        assert loaded.fingerprint == load(model, None).fingerprint
        assert PagedRun(loaded.model).step([(0, [1, 2])]).shape == (1, 384)
        (note,) = loaded.notes
        assert note.startswith("the quantised model is not cached and will be quantised again next time: ")
        assert "\n" not in note
        return note

    def test_the_disk_is_full_at_the_end(self, model: Path, cache: Path) -> None:
        with largest_file(60_000):
            loaded = load(model, cache)
        assert "MiB are free" in self.served(loaded, model)
        assert [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")] == []

    def test_the_disk_is_full_half_way(self, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("guanaco.models.loading.model_cache.SHARD_BYTES", 40_000)
        with largest_file(30_000):
            loaded = load(model, cache)
        self.served(loaded, model)
        assert [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")] == []

    def test_the_disk_is_full_before_the_manifest(
        self, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("guanaco.models.loading.model_cache.ModelCache.seal", full)
        assert "No space left" in self.served(load(model, cache), model)
        assert list_cached_models(cache) == []

    def test_the_cache_directory_cannot_be_made(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        self.served(load(model, tmp_path / "file"), model)

    def test_what_is_wrong_with_the_model_is_still_an_error(self, model: Path, cache: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, model / "model.safetensors")
        with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
            load(model, cache)
        assert [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")] == []


class TestTwoAtOnce:
    def run(self, *jobs: Callable[[], LoadedModel]) -> list[LoadedModel]:
        results: dict[int, LoadedModel] = {}
        threads = [
            threading.Thread(target=lambda i=i, job=job: results.__setitem__(i, job())) for i, job in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(results) == len(jobs)
        return [results[i] for i in range(len(jobs))]

    def test_the_second_waits_for_the_first_and_uses_its_work(self, model: Path, cache: Path) -> None:
        quantising, told = threading.Event(), threading.Event()

        def first_progress(name: str, done: int, total: int) -> None:
            quantising.set()
            assert told.wait(20)

        def second_progress(name: str, done: int, total: int) -> None:
            if name == WAITING:
                told.set()

        def first() -> LoadedModel:
            return load_model(model, reference_ops(), cache_dir=cache, progress=first_progress)

        def second() -> LoadedModel:
            assert quantising.wait(20)
            return load_model(model, reference_ops(), cache_dir=cache, progress=second_progress)

        loaded = self.run(first, second)
        assert [m.origin for m in loaded] == ["quantized", "cache"]
        assert loaded[0].fingerprint == loaded[1].fingerprint

    def test_readers_do_not_wait_for_each_other(self, model: Path, cache: Path) -> None:
        load(model, cache)
        both = threading.Barrier(2)

        def job() -> LoadedModel:
            met: list[int] = []

            def progress(name: str, done: int, total: int) -> None:
                assert name != WAITING
                if not met:
                    met.append(both.wait(20))  # broken unless both are reading at the same time

            return load_model(model, reference_ops(), cache_dir=cache, progress=progress)

        assert [m.origin for m in self.run(job, job)] == ["cache", "cache"]


class TestListAndPrune:
    def test_entries_say_what_they_are(self, originals: Path, cache: Path) -> None:
        first = load(originals / "dense", cache)
        load(originals / "other", cache)
        entries = list_cached_models(cache)
        assert {entry.source for entry in entries} == {str(originals / "dense"), str(originals / "other")}
        by_source = {entry.source: entry for entry in entries}
        entry = by_source[str(originals / "dense")]
        assert entry.fingerprint == first.fingerprint
        assert entry.num_bytes == sum(file.stat().st_size for file in entry.path.iterdir())

    def test_the_last_used_comes_first(self, originals: Path, cache: Path) -> None:
        load(originals / "dense", cache)
        load(originals / "other", cache)
        for entry in list_cached_models(cache):
            os.utime(entry.path / MANIFEST, (1000, 1000))
        load(originals / "dense", cache)
        assert [entry.source for entry in list_cached_models(cache)] == [
            str(originals / "dense"),
            str(originals / "other"),
        ]

    def test_all_or_some_or_the_unused_are_deleted(self, originals: Path, cache: Path) -> None:
        load(originals / "dense", cache)
        load(originals / "other", cache)
        first, second = list_cached_models(cache)
        os.utime(first.path / MANIFEST, (1000, 1000))
        assert prune_cached_models(cache, unused_for_seconds=3600) == ([replace(first, last_used_seconds=1000.0)], [])
        assert prune_cached_models(cache, [second.key]) == ([second], [])
        assert list_cached_models(cache) == []
        load(originals / "dense", cache)
        deleted, _ = prune_cached_models(cache)
        assert len(deleted) == 1
        assert load(originals / "dense", cache).origin == "quantized"

    def test_one_that_is_being_read_is_left(self, originals: Path, cache: Path) -> None:
        load(originals / "dense", cache)
        (entry,) = list_cached_models(cache)
        with ModelCache(cache).lock(entry.key, exclusive=False):
            assert prune_cached_models(cache) == ([], [entry])
        assert prune_cached_models(cache) == ([entry], [])

    def test_a_name_that_is_not_there(self, cache: Path) -> None:
        with pytest.raises(ModelError, match="no cached model is called nothing: `guanaco models list`"):
            prune_cached_models(cache, ["nothing"])

    def test_no_cache_at_all(self, cache: Path) -> None:
        assert list_cached_models(cache) == []
        assert prune_cached_models(cache) == ([], [])


def test_leftovers_of_other_entries_are_removed_unless_somebody_writes_them(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    dead, busy = "a" * 64, "b" * 64
    for key in (dead, busy):
        (cache.root / f".{key}.partial-abcdefgh").mkdir(parents=True)
    (cache.root / f".{dead}.manifest").mkdir()
    (cache.root / ".mine").mkdir()
    with cache.lock(busy, exclusive=True):
        cache.remove_leftovers()
    left = {path.name for path in cache.root.iterdir() if path.is_dir()}
    assert left == {f".{busy}.partial-abcdefgh", ".mine"}
