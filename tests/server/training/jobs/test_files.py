"""Uploaded files: kept whole or not at all, each for one key, within its limits, under names that are never paths."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.jobs.errors import RequestRefused
from guanaco.server.training.jobs.files import FileStore, label_of
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.records import StoredFile

ALICE, BOB = "a" * 64, "b" * 64


def make(directory: Path, **limits: Any) -> FileStore:
    store = FileStore(directory, TrainLimits(**limits))
    store.open()
    return store


def put(store: FileStore, content: bytes = b"{}\n", owner: str = ALICE, name: str = "chat.jsonl") -> StoredFile:
    upload = store.begin(owner)
    try:
        upload.write(content)
        return store.add(upload, name)
    finally:
        store.drop(upload)


def temporary(directory: Path) -> list[str]:
    return os.listdir(directory / "incoming")


def test_a_file_comes_back_after_a_restart_for_its_key_alone(tmp_path: Path) -> None:
    file = put(make(tmp_path), b"abc")
    store = make(tmp_path)
    assert store.get(ALICE, file.id) == file
    assert store.path(file).read_bytes() == b"abc"
    assert store.of(BOB) == []
    for owner, name in ((BOB, file.id), (ALICE, "file-" + "0" * 24), (ALICE, "../" + file.id)):
        with pytest.raises(RequestRefused) as refused:
            store.get(owner, name)
        assert refused.value.code == ErrorCode.FILE_NOT_FOUND
    assert (store.path(file).stat().st_mode | (tmp_path / "files").stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("chat.jsonl", "chat.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/abs/x.jsonl", "x.jsonl"),
        ("..", "upload.jsonl"),
        ("", "upload.jsonl"),
        ("a\nb\x00c.jsonl", "abc.jsonl"),
        ("x" * 999, "x" * 255),
    ],
)
def test_a_file_name_is_a_label(name: str, shown: str, tmp_path: Path) -> None:
    assert label_of(name) == shown
    store = make(tmp_path / "in")
    file = put(store, name=name)
    assert file.filename == shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"], "nothing lies outside"
    assert os.listdir(tmp_path / "in" / "files") == [file.id]


def test_limits_of_a_key(tmp_path: Path) -> None:
    store = make(tmp_path, max_file_bytes=10, max_files_per_key=3, max_bytes_per_key=15)
    put(store, b"x" * 10)
    with pytest.raises(RequestRefused, match="larger than 10 bytes") as refused:
        put(store, b"x" * 11, owner=BOB)
    assert refused.value.code == ErrorCode.REQUEST_TOO_LARGE
    with pytest.raises(RequestRefused, match="15 bytes together") as refused:
        put(store, b"x" * 6)
    assert refused.value.code == ErrorCode.TRAINING_QUOTA_EXCEEDED
    put(store, b"x" * 10, owner=BOB)
    put(store, b"x")
    running = store.begin(ALICE)  # an upload counts before it is whole
    with pytest.raises(RequestRefused, match="3 files"):
        store.begin(ALICE)
    store.drop(running)
    store.delete(ALICE, put(store, b"x").id, ())
    put(store, b"x")
    assert temporary(tmp_path) == []


def test_two_uploads_at_once_share_the_bytes_of_their_key(tmp_path: Path) -> None:
    store = make(tmp_path, max_bytes_per_key=10)
    one, two = store.begin(ALICE), store.begin(ALICE)
    one.write(b"x" * 6)
    with pytest.raises(RequestRefused, match="10 bytes together"):
        two.write(b"x" * 5)
    two.write(b"x" * 4)


def test_an_upload_that_is_kept_counts_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the end of an upload and its place among the files nothing gets past the limit."""
    store = make(tmp_path, max_bytes_per_key=10)
    upload, seen = store.begin(ALICE), []
    upload.write(b"x" * 6)
    real, drop = store._lock, store.drop

    def dropped(one: Any) -> None:
        drop(one)
        seen.append(store._used(ALICE))

    class Lock:
        def __enter__(self) -> None:
            real.acquire()

        def __exit__(self, *_: object) -> None:
            seen.append(store._used(ALICE))
            real.release()

    monkeypatch.setattr(store, "_lock", Lock())
    monkeypatch.setattr(store, "drop", dropped)
    store.add(upload, "chat.jsonl")
    assert len(seen) >= 2
    assert set(seen) == {(1, 6)}


def test_a_write_after_the_drop_leaves_nothing(tmp_path: Path) -> None:
    store = make(tmp_path)
    upload = store.begin(ALICE)
    upload.write(b"{}")
    store.drop(upload)
    upload.write(b"{}")  # of a thread that was slower than the request's end
    assert temporary(tmp_path) == []


def test_bytes_count_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path, max_bytes_per_key=10)
    one, two = store.begin(ALICE), store.begin(ALICE)
    refusals, write = [], os.write

    def meanwhile(handle: int, data: Any) -> int:
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(RequestRefused, match="10 bytes together") as refused:
            two.write(b"x" * 5)
        refusals.append(refused.value)
        return write(handle, data)

    monkeypatch.setattr(os, "write", meanwhile)
    one.write(b"x" * 6)
    assert (len(refusals), one.num_bytes, two.num_bytes) == (1, 6, 0)


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "rename" else os, call, full)
        with pytest.raises(RequestRefused, match="No space left on device") as refused:
            put(store)
    assert refused.value.code == ErrorCode.STORE_FAILED
    assert str(tmp_path) not in str(refused.value)
    assert (temporary(tmp_path), os.listdir(tmp_path / "files"), store.of(ALICE)) == ([], [], [])
    put(store)


def test_what_a_crash_left_is_removed_at_the_start(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.begin(ALICE).write(b"half")
    kept, cut = put(store), put(store)
    (tmp_path / "files" / cut.id / "meta.json").unlink()
    assert temporary(tmp_path)
    again = make(tmp_path)
    assert temporary(tmp_path) == []
    assert [file.id for file in again.of(ALICE)] == [kept.id] == os.listdir(tmp_path / "files")


def test_a_file_that_a_job_reads_stays(tmp_path: Path) -> None:
    store = make(tmp_path)
    file = put(store)
    with pytest.raises(RequestRefused) as refused:
        store.delete(ALICE, file.id, (file.id,))
    assert refused.value.code == ErrorCode.FILE_IN_USE
    with pytest.raises(RequestRefused):
        store.delete(BOB, file.id, ())
    store.delete(ALICE, file.id, ())
    assert os.listdir(tmp_path / "files") == []


def test_results_are_files_that_no_limit_counts(tmp_path: Path) -> None:
    store = make(tmp_path, max_files_per_key=1, max_bytes_per_key=4)
    result = store.add_result(ALICE, "step_metrics.csv", b"step\n1\n", "file-" + "1" * 24)
    assert result.purpose == "fine-tune-results"
    put(store, b"abcd")
    assert make(tmp_path).get(ALICE, result.id) == result


def test_results_are_on_the_disk_before_their_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sync, synced = make(tmp_path), os.fsync, []

    def seen(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/.")[2].partition("-")[0])
        sync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    store.add_result(ALICE, "step_metrics.csv", b"step\n1\n", "file-" + "1" * 24)
    assert [name for name in synced if name in ("content", "meta.json")] == ["content", "meta.json"]
