"""The files of a shared registry: what two writers do to one another, and what a reader finds."""

from pathlib import Path

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME
from guanaco.adapters.peft.weights import WEIGHTS_NAME
from guanaco.adapters.versions import shared_registry
from guanaco.adapters.versions.registry_file import Saved, SavedList
from guanaco.adapters.versions.shared_registry import LIST_NAME, SharedRegistry

VERSION = "a" * 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    (made / CONFIG_NAME).write_text("{}")
    (made / WEIGHTS_NAME).write_bytes(b"weights")
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_same", [True, False])
def test_a_version_that_another_server_put_meanwhile(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    shared = SharedRegistry(tmp_path / "shared")
    sync, calls = shared_registry.sync_directory, []

    def put_meanwhile(path: Path) -> None:
        sync(path)
        if not calls:
            calls.append(path)
            SharedRegistry(shared.directory).add_version(VERSION, source)
            if not is_same:
                (shared.folder(VERSION) / WEIGHTS_NAME).write_bytes(b"half")

    monkeypatch.setattr(shared_registry, "sync_directory", put_meanwhile)
    shared.add_version(VERSION, source)
    assert files_of(shared.folder(VERSION)) == files_of(source)
    assert [path.name for path in shared.folder(VERSION).parent.iterdir()] == [VERSION], "nothing is left"


def test_a_damaged_copy_is_replaced_and_an_intact_one_stays(tmp_path: Path, source: Path) -> None:
    shared = SharedRegistry(tmp_path / "shared")
    shared.add_version(VERSION, source)
    before = shared.folder(VERSION).stat().st_ino
    shared.add_version(VERSION, source)
    assert shared.folder(VERSION).stat().st_ino == before
    (shared.folder(VERSION) / WEIGHTS_NAME).unlink()
    shared.add_version(VERSION, source)
    assert files_of(shared.folder(VERSION)) == files_of(source)


def test_a_copy_of_another_user_is_used(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedRegistry(tmp_path / "shared")
    shared.add_version(VERSION, source)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shared_registry.os, "utime", refused)
    shared.add_version(VERSION, source)


def test_a_list_is_read_when_it_has_changed_and_not_otherwise(tmp_path: Path) -> None:
    writer, reader = SharedRegistry(tmp_path), SharedRegistry(tmp_path)
    assert reader.read() == SavedList(), "nobody has written one"
    lock = writer.try_lock()
    assert lock is not None
    assert reader.try_lock() is None
    written = writer.write(SavedList((Saved("a", VERSION, "somewhere"),)))
    lock.close()
    assert written.generation == 1
    first = reader.read()
    assert first == written
    assert reader.read() is first
    again = writer.write(written)
    assert reader.read().generation == again.generation == 2
    (tmp_path / LIST_NAME).unlink()
    with pytest.raises(AdapterError, match="gone"):
        reader.read()
    assert reader.read_to_change() == again, "a change goes on from what was read last"


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    shared = SharedRegistry(tmp_path / "file" / "below")
    for change in (shared.try_lock, lambda: shared.add_version(VERSION, source), lambda: shared.write(SavedList())):
        with pytest.raises(AdapterError, match="cannot be changed"):
            change()


def test_a_list_can_be_read_by_other_users_from_its_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower may open the list between its rename and anything that comes after."""
    shared, modes = SharedRegistry(tmp_path / "shared"), []
    rename = Path.replace

    def seen(self: Path, target: Path) -> Path:
        modes.append(self.stat().st_mode & 0o777)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", seen)
    lock = shared.try_lock()
    assert lock is not None
    shared.write(SavedList())
    lock.close()
    assert modes == [0o644]
