"""A checkpoint that cannot be written to its end: it appears whole or not at all."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from guanaco.models.errors import ModelError
from guanaco.models.loading import quantize as quantize_module
from guanaco.models.loading.quantize import (
    Nf4CheckpointWriter,
    quantize_checkpoint,
)
from support.models.tiny_models import make_tiny_llama


def leftovers(parent: Path, *known: str) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name not in known]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond: the nearest thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    src = make_tiny_llama(tmp_path / "src")
    with file_size_limit(20_000), pytest.raises(ModelError, match=r"cannot write .*dst.*make room") as caught:
        quantize_checkpoint(src, tmp_path / "dst")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "src") == []


@pytest.mark.parametrize("step", ["_write_json", "_sync", "save_file"])
def test_any_step_of_writing_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantize_module, step, full)
    with pytest.raises(ModelError, match="No space left on device"):
        quantize_checkpoint(make_tiny_llama(tmp_path / "src"), tmp_path / "dst")
    assert leftovers(tmp_path, "src") == []


def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    writer = Nf4CheckpointWriter(tmp_path / "dst", {"model_type": "llama"}, max_shard_bytes=100)

    def interrupted() -> None:
        with writer:
            for i in range(3):
                writer.add(f"x{i}", torch.ones(60))
            assert not (tmp_path / "dst").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert leftovers(tmp_path) == []


def test_two_writers_of_one_directory(tmp_path: Path) -> None:
    """The first to finish wins; the other says so and leaves the first one's files alone."""
    first, second = (Nf4CheckpointWriter(tmp_path / "dst", {}) for _ in range(2))
    for i, writer in enumerate((first, second)):
        writer.add("x", torch.full((4,), float(i)))
    with first:
        pass
    with pytest.raises(ModelError, match="appeared while"), second:
        pass
    assert load_file(tmp_path / "dst" / "model.safetensors")["x"].tolist() == [0.0] * 4
    assert leftovers(tmp_path, "dst") == []
