"""A source that somebody writes to while it is read: never half of one version and half of another."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME
from guanaco.adapters.peft.weights import WEIGHTS_NAME
from guanaco.adapters.versions import store as store_module
from guanaco.adapters.versions.holds import HoldLedger
from guanaco.adapters.versions.store import VersionStore
from support.adapters.tiny_adapters import make_adapter

TARGETS = {"layers.0.self_attn.q_proj": (8, 8)}


def make(path: Path, seed: int) -> Path:
    return make_adapter(path, TARGETS, 2, seed=seed, modules=("q_proj",))


def overwrite(path: Path, other: Path) -> None:
    with (path / WEIGHTS_NAME).open("r+b") as file:
        file.write((other / WEIGHTS_NAME).read_bytes())
    os.utime(path / WEIGHTS_NAME, ns=(1, 1))  # whatever the clock's resolution


def rename_weights(path: Path, other: Path) -> None:
    (other / WEIGHTS_NAME).rename(path / WEIGHTS_NAME)


def rename_config(path: Path, other: Path) -> None:
    (other / CONFIG_NAME).rename(path / CONFIG_NAME)


def truncate(path: Path, other: Path) -> None:
    os.truncate(path / WEIGHTS_NAME, 100)


def delete(path: Path, other: Path) -> None:
    (path / CONFIG_NAME).unlink()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (overwrite, "changed_while_reading"),
        (rename_weights, "changed_while_reading"),
        (rename_config, "changed_while_reading"),
        (truncate, "changed_while_reading"),
        (delete, "not_found"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_change_during_the_copy_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, Path], None], code: str
) -> None:
    """In the middle of the weights: the config is copied, and some of the bytes."""
    path, other = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    store = VersionStore(tmp_path / "store", TARGETS, HoldLedger())
    read, pending = store_module._read, [change]

    def read_and_change(source: object, name: str) -> bytes:
        chunk: bytes = read(source, name)  # type: ignore[arg-type]
        if name == WEIGHTS_NAME and pending:
            pending.pop()(path, other)
        return chunk

    monkeypatch.setattr(store_module, "_COPY_BYTES", 64)
    monkeypatch.setattr(store_module, "_read", read_and_change)
    with pytest.raises(AdapterError) as refusal:
        store.ingest(path, name="a")
    assert refusal.value.code == code
    assert [entry.name for entry in store.directory.iterdir()] == [".lock"]


def test_a_source_that_cannot_be_read_is_not_the_stores_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    store, read = VersionStore(tmp_path / "store", TARGETS, HoldLedger()), store_module._read
    monkeypatch.setattr(store_module, "_read", lambda _, name: read(Failing(), name))  # type: ignore[arg-type]
    with pytest.raises(AdapterError) as refusal:
        store.ingest(make(tmp_path / "a", 1), name="a")
    assert refusal.value.code == "unreadable"


def test_what_the_header_tells_is_found_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a", 1)
    os.truncate(path / WEIGHTS_NAME, 3 << 30)  # with a hole: nothing is written
    store = VersionStore(tmp_path / "store", TARGETS, HoldLedger())
    monkeypatch.setattr(store, "_copy", None)
    with pytest.raises(AdapterError) as refusal:
        store.ingest(path, name="a")
    assert refusal.value.code == "bad_layout"
