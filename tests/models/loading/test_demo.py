"""The embedded default: the right bytes, fetched once, whole or not at all, and one line for whatever goes wrong.

Fetching and caching are proven on a wheel of a few hundred bytes and a pip of our own; the real one is converted once
by the fixture `demo_model_dir`, and compared with the recorded fingerprint.
"""

import hashlib
import json
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from guanaco.adapters.peft.weights import BASE_FINGERPRINT_KEY, load_adapter
from guanaco.models.architectures.config_json import read_config
from guanaco.models.errors import ModelError
from guanaco.models.loading import demo, demo_convert
from guanaco.models.loading.demo import DemoUnavailable, demo_adapters, demo_path, ensure_demo_model, is_intact
from guanaco.models.loading.demo_convert import DEMO_FINGERPRINT, checkpoint_fingerprint
from guanaco.models.loading.loader import load_model
from support.models.oracles import reference_ops

MAX_ADAPTER_BYTES = 5 << 20  # the demo ships in the wheel


def test_the_demo_has_the_recorded_weights(demo_model_dir: Path) -> None:
    """On every machine the same bytes: what the adapters were trained on."""
    assert checkpoint_fingerprint(demo_model_dir) == DEMO_FINGERPRINT
    assert json.loads((demo_model_dir / demo.MANIFEST).read_text())["fingerprint"] == DEMO_FINGERPRINT
    assert is_intact(demo_model_dir)
    config = read_config(demo_model_dir)
    assert (config.num_layers, config.hidden_size, config.num_kv_heads, config.tie_word_embeddings) == (
        30,
        576,
        3,
        True,
    )
    assert "Apache License" in (demo_model_dir / "LICENSE").read_text()


def test_the_demo_adapters_fit_their_base(demo_model_dir: Path) -> None:
    loaded = load_model(demo_model_dir, reference_ops())
    assert list(demo_adapters()) == ["pirate", "terse"]
    for name, path in demo_adapters().items():
        adapter = load_adapter(path, loaded.model.lora_targets, name=name)
        assert adapter.base_fingerprint == loaded.fingerprint, f"{name} was trained on another base"
        file = path / "adapter_model.safetensors"
        assert file.stat().st_size <= MAX_ADAPTER_BYTES
        with safe_open(file, "pt") as tensors:
            assert BASE_FINGERPRINT_KEY in tensors.metadata()
        assert (path / "README.md").read_text().startswith("---\nlicense: apache-2.0")
    ranks = {load_adapter(p, loaded.model.lora_targets, name=n).max_rank for n, p in demo_adapters().items()}
    assert len(ranks) == 2, "the first screen shows different ranks in one batch"


class Demo:
    """A small wheel in place of the real one, and what happened with it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = tmp_path / "cache"
        self.num_conversions = 0
        self.wheel = tmp_path / demo.WHEEL_NAME
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(demo.GGUF_MEMBER, b"GGUF and some weights")
            archive.writestr(demo.LICENSE_MEMBER, "Apache License")
        monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"GGUF and some weights").hexdigest())
        monkeypatch.setattr(demo_convert, "convert_demo", self.convert)
        monkeypatch.setattr(demo_convert, "checkpoint_fingerprint", lambda path: "f" * 64)
        self.monkeypatch = monkeypatch
        find_dest = 'while [ $# -gt 1 ]; do [ "$1" = --dest ] && dest="$2"; shift; done'
        self.pip(f'{find_dest}; mkdir -p "$dest"; cp "{self.wheel}" "$dest"')

    def convert(self, gguf_path: Path, license_text: str, dst: Path, progress: object) -> None:
        assert gguf_path.read_bytes() == b"GGUF and some weights"
        self.num_conversions += 1
        dst.mkdir()
        (dst / "model.safetensors").write_bytes(b"converted")
        (dst / "LICENSE").write_text(license_text)

    def pip(self, body: str) -> None:
        """`python -m pip …` runs this instead."""
        script = self.wheel.parent / "python"
        script.write_text(f"#!/bin/sh\necho started >> {self.wheel.parent}/pip-calls\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.monkeypatch.setattr(demo.sys, "executable", str(script))

    @property
    def num_downloads(self) -> int:
        calls = self.wheel.parent / "pip-calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def ensure(self, **options: object) -> Path:
        return ensure_demo_model(self.cache, **options)  # type: ignore[arg-type]

    def leftovers(self) -> list[str]:
        return sorted(
            p.name for p in (self.cache / "demo").iterdir() if p.name not in (".lock", demo_path(self.cache).name)
        )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    return Demo(tmp_path, monkeypatch)


def test_it_is_fetched_and_converted_once_and_then_offline(small: Demo) -> None:
    seen: list[str] = []
    first = small.ensure(progress=lambda what, done, total: seen.append(what))
    assert (first / "model.safetensors").read_bytes() == b"converted"
    assert any(demo.FETCHING in what for what in seen)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert small.ensure(offline=True) == first
    assert (small.num_downloads, small.num_conversions) == (1, 1)
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert small.leftovers() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.safetensors").write_bytes(b"convertee"),
        lambda path: (path / "model.safetensors").write_bytes(b"conv"),
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / demo.MANIFEST).unlink(),
        lambda path: (path / demo.MANIFEST).write_text("{"),
        lambda path: (path / demo.MANIFEST).write_text('{"files": {}}'),
        lambda path: shutil.rmtree(path),
        lambda path: (path.parent / ".building-left").mkdir(),
    ],
)
def test_a_damaged_or_half_written_cache_is_rebuilt(small: Demo, damage: Callable[[Path], object]) -> None:
    path = small.ensure()
    damage(path)
    half_written = (path.parent / ".building-left").exists()
    assert is_intact(path) == half_written
    assert (small.ensure() / "model.safetensors").read_bytes() == b"converted"
    assert is_intact(path)
    assert small.num_conversions == (1 if half_written else 2)


def test_an_interruption_leaves_nothing_that_counts(small: Demo) -> None:
    def interrupted(*arguments: object) -> None:
        small.convert(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    small.monkeypatch.setattr(demo_convert, "convert_demo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small.ensure()
    assert not demo_path(small.cache).exists()
    assert small.leftovers() == []


def test_without_the_registry_it_says_what_to_do(small: Demo) -> None:
    small.pip("echo 'ERROR: Could not find a version that satisfies the requirement' >&2; exit 1")
    with pytest.raises(DemoUnavailable) as caught:
        small.ensure()
    text = str(caught.value)
    for part in ("Could not find a version", "network", "proxy", demo.WHEEL_NAME, "--model"):
        assert part in text
    assert "\n" not in text
    assert small.leftovers() == []


def test_offline_and_not_cached(small: Demo) -> None:
    with pytest.raises(DemoUnavailable, match="--offline"):
        small.ensure(offline=True)
    assert small.num_downloads == 0


def test_a_wheel_that_was_put_there_needs_no_network(small: Demo) -> None:
    (small.cache / "demo").mkdir(parents=True)
    shutil.copy(small.wheel, small.cache / "demo")
    small.ensure(offline=True)
    assert (small.num_downloads, small.num_conversions) == (0, 1)


def test_other_bytes_are_refused(small: Demo) -> None:
    (small.cache / "demo").mkdir(parents=True)
    (small.cache / "demo" / demo.WHEEL_NAME).write_bytes(small.wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="not the expected file"):
        small.ensure()
    (small.cache / "demo" / demo.WHEEL_NAME).unlink()
    small.monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="another model than expected"):
        small.ensure()
    assert small.num_conversions == 0


def test_a_disk_that_takes_no_more_is_one_line(small: Demo) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    small.monkeypatch.setattr(demo_convert, "convert_demo", full)
    with pytest.raises(ModelError, match=r"No space left on device.* make room"):
        small.ensure()


def test_of_two_at_once_one_does_the_work(small: Demo) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object) -> None:
        started.set()
        assert go_on.wait(30)
        small.convert(*arguments)  # type: ignore[arg-type]

    small.monkeypatch.setattr(demo_convert, "convert_demo", slow)
    results: list[Path] = []
    waits = threading.Event()
    first = threading.Thread(target=lambda: results.append(small.ensure()))
    first.start()
    assert started.wait(30)
    second = threading.Thread(
        target=lambda: results.append(
            small.ensure(progress=lambda what, *_: waits.set() if what == demo.WAITING else None)
        )
    )
    second.start()
    assert waits.wait(30), "the second does not wait"
    go_on.set()
    first.join(30)
    second.join(30)
    assert len(results) == 2
    assert (small.num_downloads, small.num_conversions) == (1, 1)


def test_the_manifest_names_every_file(demo_model_dir: Path) -> None:
    files = json.loads((demo_model_dir / demo.MANIFEST).read_text())["files"]
    assert set(files) == {p.name for p in demo_model_dir.iterdir()} - {demo.MANIFEST}
