"""The private copies of adapter versions: complete or not at all, and never other than what they were."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import WEIGHTS_NAME, AdapterLimits
from guanaco.adapters.versions.holds import Holder, HoldLedger
from guanaco.adapters.versions.registry_file import RegistryFile, Saved
from guanaco.adapters.versions.store import VersionStore
from support.adapters.kill_writers import BUGS
from support.adapters.tiny_adapters import make_adapter
from support.children import environment

TARGETS = {"layers.0.self_attn.q_proj": (8, 8)}


def content(store: VersionStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir() if path.name != ".lock")


@pytest.fixture
def holds() -> HoldLedger:
    return HoldLedger()


@pytest.fixture
def store(tmp_path: Path, holds: HoldLedger) -> VersionStore:
    return VersionStore(tmp_path / "store", TARGETS, holds)


def source(tmp_path: Path, seed: int = 0, rank: int = 2) -> Path:
    return make_adapter(tmp_path / f"source{seed}", TARGETS, rank, seed=seed, modules=("q_proj",))


def test_a_version_outlives_its_source(store: VersionStore, tmp_path: Path) -> None:
    path = source(tmp_path)
    loaded = store.ingest(path, name="a")
    shutil.rmtree(path)
    store.close()
    again = VersionStore(store.directory, TARGETS, HoldLedger()).read(loaded.version)
    (target,) = again.pairs
    assert again.pairs[target].a.equal(loaded.pairs[target].a)
    assert store.versions() == {loaded.version}


def test_a_refused_adapter_leaves_nothing(store: VersionStore, tmp_path: Path) -> None:
    path = source(tmp_path)
    weights = path / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(AdapterError):
        store.ingest(path, name="a")
    store.close()
    small = VersionStore(store.directory, TARGETS, HoldLedger(), limits=AdapterLimits(max_file_bytes=100))
    with pytest.raises(AdapterError) as refusal:
        small.ingest(source(tmp_path, 1), name="a")
    assert refusal.value.code == "file_too_large"
    assert content(store) == []


@pytest.mark.parametrize("damage", ["changed", "truncated", "swapped", "gone"])
def test_a_damaged_copy_is_noticed_and_mended_by_a_new_load(store: VersionStore, tmp_path: Path, damage: str) -> None:
    version = store.ingest(source(tmp_path), name="a").version
    weights = store.directory / version / WEIGHTS_NAME
    data = bytearray(weights.read_bytes())
    match damage:
        case "changed":
            data[-1] ^= 1
            weights.write_bytes(data)
        case "truncated":
            weights.write_bytes(data[:-1])
        case "swapped":
            shutil.copy(source(tmp_path, 1) / WEIGHTS_NAME, weights)
        case "gone":
            shutil.rmtree(store.directory / version)
    with pytest.raises(AdapterError):
        store.read(version)
    assert store.ingest(source(tmp_path), name="a").version == version
    assert store.read(version).version == version


def test_collect_spares_what_was_just_ingested(store: VersionStore, holds: HoldLedger, tmp_path: Path) -> None:
    old, new = (store.ingest(source(tmp_path, seed), name="a").version for seed in range(2))
    holds.give_back(old, Holder.LOAD)
    store.collect()
    assert store.versions() == {new}
    store.ingest(source(tmp_path, 1), name="b")
    holds.give_back(new, Holder.LOAD)
    store.collect()
    assert store.versions() == {new}, "one of two loads of it still holds it"
    holds.give_back(new, Holder.LOAD)
    store.collect()
    assert store.versions() == frozenset()


def test_what_a_killed_process_left_is_removed(store: VersionStore) -> None:
    (store.directory / ".incoming-x").mkdir()
    (store.directory / ".incoming-x" / "f").write_text("half")
    store.close()
    VersionStore(store.directory, TARGETS, HoldLedger())
    assert content(store) == []


def test_a_store_has_one_server(store: VersionStore, tmp_path: Path) -> None:
    """Two of them would each remove the versions that only the other one knows."""
    version = store.ingest(source(tmp_path), name="a").version
    with pytest.raises(AdapterError, match="--adapter-store") as refusal:
        VersionStore(store.directory, TARGETS, HoldLedger())
    assert refusal.value.code == "store_in_use"
    assert store.read(version).version == version
    store.close()
    VersionStore(store.directory, TARGETS, HoldLedger()).close()


def test_a_copy_in_order_is_not_exchanged(store: VersionStore, tmp_path: Path) -> None:
    """A crash in the middle of an exchange would lose a version that was there."""
    version = store.ingest(source(tmp_path), name="a").version
    before = (store.directory / version).stat().st_ino
    assert store.ingest(source(tmp_path), name="b").version == version
    assert (store.directory / version).stat().st_ino == before


def test_a_version_is_no_path(store: VersionStore) -> None:
    for version in ("..", "../x", "", "a" * 63, "A" * 64, "a" * 64):
        with pytest.raises(AdapterError) as refusal:
            store.read(version)
        assert refusal.value.code == "version_missing"


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"store .* cannot be used"):
        VersionStore(tmp_path / "file" / "store", TARGETS, HoldLedger())


def kill_writers(directory: Path, num_kills: int, *bug: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "support.adapters.kill_writers", str(directory), str(num_kills), *bug]
    return subprocess.run(
        program, capture_output=True, text=True, timeout=300, check=False, cwd=directory, env=environment()
    )


def test_killed_at_any_moment_nothing_is_corrupt(tmp_path: Path, proof_count: Callable[[int, int], int]) -> None:
    done = kill_writers(tmp_path, proof_count(12, 50))
    assert done.returncode == 0, done.stderr
    assert "versions read back" in done.stdout


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_by_killing(tmp_path: Path, bug: str) -> None:
    done = kill_writers(tmp_path, 100, bug)
    assert done.returncode == 1, f"100 kills did not find it: {done.stdout}"
    assert re.search("AdapterError: .*(damaged|no version|adapter_config|adapter_model)", done.stderr), done.stderr


def test_the_list_is_written_whole(tmp_path: Path) -> None:
    file = RegistryFile(tmp_path / "registry.json")
    assert file.read() == ()
    records = (Saved("a", "1" * 64, "x", ("2" * 64,), 0.5), Saved("b", "3" * 64, "y"))
    file.write(records)
    assert file.read() == records
    with pytest.raises(TypeError):
        file.write([Saved("a", object(), "x")])  # type: ignore[arg-type]
    assert file.read() == records
    assert [path.name for path in tmp_path.iterdir()] == ["registry.json"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "{}", '{"format": 2, "adapters": []}', '{"format": 1, "adapters": [1]}'),
        json.dumps({"format": 1, "adapters": [{"name": "a", "version": 3, "source": ""}]}),
        json.dumps({"format": 1, "adapters": [{"name": "a", "version": "v", "source": "", "effect": "much"}]}),
    ],
)
def test_a_damaged_list_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "registry.json"
    path.write_text(text)
    with pytest.raises(AdapterError, match=r"registry\.json"):
        RegistryFile(path).read()


def test_half_written_lists_are_removed(tmp_path: Path) -> None:
    file = RegistryFile(tmp_path / "registry.json")
    file.write([])
    for name in (".registry.json-abc", ".registry.json-def"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".other").write_text("stays")
    file.remove_leftovers()
    assert {path.name for path in tmp_path.iterdir()} == {"registry.json", ".other"}
