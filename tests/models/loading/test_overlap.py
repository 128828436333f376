"""A first start that reads, quantises and writes at once: nothing is read twice, no error is lost, the order stays."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import SafetensorsCheckpoint, open_checkpoint
from guanaco.models.loading.loader import load_model
from guanaco.models.loading.overlap import Behind, ReadAhead
from guanaco.models.loading.quantize import quantize_checkpoint
from support.kernels.providers import provider_ops
from support.models.tiny_models import make_tiny_llama

SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("embed", (8, 8)), ("a", (4, 8)), ("norm", (4,)), ("b", (4, 8)), ("c", (5, 8)), ("d", (2, 8)), ("head", (8, 8)),
]  # fmt: skip


class Source:
    """Weights of their own shapes; notes which thread reads which."""

    def __init__(self) -> None:
        self.read: list[tuple[str, bool]] = []  # (name, by the other thread)

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor:
        return self.tensor(name, shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "bad":
            raise ModelError("bad is damaged")
        self.read.append((name, threading.current_thread() is not threading.main_thread()))
        return torch.full(shape, float(len(self.read)))


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def test_the_next_matrix_is_read_ahead_where_both_fit(thread: ThreadPoolExecutor) -> None:
    source = Source()
    ahead = ReadAhead(source, SHAPES, thread)
    for name, shape in SHAPES:
        got = ahead.tensor(name, shape) if name in ("embed", "norm") else ahead.matrix(name, (shape[0], shape[1]))
        assert tuple(got.shape) == shape
    read = dict(source.read)
    assert sorted(read) == sorted(name for name, _ in SHAPES)
    assert len(source.read) == len(SHAPES), "each is read once"
    # 64 values are the largest weight: a and b fit beside each other, b and c (72) do not, nor anything beside embed.
    assert [name for name, _ in SHAPES if read[name]] == ["b", "d"]


def test_another_order_is_served_too(thread: ThreadPoolExecutor) -> None:
    source = Source()
    ahead = ReadAhead(source, SHAPES, thread)
    for name in ("a", "d", "b", "unknown"):
        assert tuple(ahead.matrix(name, (4, 8)).shape) == (4, 8)


def test_an_error_of_reading_ahead_comes_with_its_own_weight(thread: ThreadPoolExecutor) -> None:
    ahead = ReadAhead(Source(), [("big", (64, 64)), ("a", (4, 8)), ("bad", (4, 8))], thread)
    ahead.matrix("a", (4, 8))
    with pytest.raises(ModelError, match="bad is damaged"):
        ahead.matrix("bad", (4, 8))


def test_calls_behind_keep_their_order_are_few_and_hide_no_error(thread: ThreadPoolExecutor) -> None:
    done: list[int] = []
    gate = threading.Event()
    behind = Behind(thread)
    behind(lambda: done.append(int(gate.wait(30))))
    behind(lambda: done.append(2))
    late = threading.Timer(0.05, gate.set)
    late.start()
    behind(lambda: done.append(3))  # waits for the first one
    assert gate.is_set()
    behind.finish()
    assert done == [1, 2, 3]

    def fail() -> None:
        raise ModelError("the disk is gone")

    behind(fail)
    with pytest.raises(ModelError, match="the disk is gone"):
        behind.finish()


def test_reading_ahead_and_writing_behind_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in the cache is the one that `guanaco quantize` writes weight by weight."""
    model = make_tiny_llama(tmp_path / "model")
    threads: set[str] = set()
    original = SafetensorsCheckpoint.matrix

    def spy(self: Any, name: str, shape: tuple[int, int]) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return original(self, name, shape)

    monkeypatch.setattr(SafetensorsCheckpoint, "matrix", spy)
    loaded = load_model(model, provider_ops("cpu"), cache_dir=tmp_path / "cache")
    assert threads == {"MainThread", "guanaco-read"}
    quantize_checkpoint(model, tmp_path / "nf4")
    assert load_model(tmp_path / "nf4", provider_ops("cpu")).fingerprint == loaded.fingerprint
    (copy,) = [path.parent for path in (tmp_path / "cache" / "models").glob("*/config.json")]
    first, second = open_checkpoint(copy), open_checkpoint(tmp_path / "nf4")
    assert isinstance(first, SafetensorsCheckpoint)
    assert isinstance(second, SafetensorsCheckpoint)
    assert first._home.keys() == second._home.keys()
    for name, file in first._home.items():
        assert torch.equal(file.read(name).view(torch.uint8), second._home[name].read(name).view(torch.uint8)), name


def test_the_cache_does_not_wait_for_the_disk_and_a_conversion_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 GB of a 7B model took longer to sync than to quantise. What a power cut leaves is found by its hashes."""
    model = make_tiny_llama(tmp_path / "model")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    load_model(model, provider_ops("cpu"), cache_dir=tmp_path / "cache")
    assert not synced
    quantize_checkpoint(model, tmp_path / "nf4")
    assert synced


@pytest.mark.parametrize("left", [b"", b"\0" * 4096])
def test_files_that_a_power_cut_left_empty_are_made_again(tmp_path: Path, left: bytes) -> None:
    model = make_tiny_llama(tmp_path / "model")
    first = load_model(model, provider_ops("cpu"), cache_dir=tmp_path / "cache")
    entries = [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    assert len(entries) == 2
    for name in ("config.json", "model.safetensors", "weights.bin", "manifest.json"):
        for path in (tmp_path / "cache" / "models").glob(f"*/{name}"):
            path.write_bytes(left)
            again = load_model(model, provider_ops("cpu"), cache_dir=tmp_path / "cache")
            assert again.fingerprint == first.fingerprint, name
            assert load_model(model, provider_ops("cpu"), cache_dir=tmp_path / "cache").origin == "cache"
