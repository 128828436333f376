"""Uploaded files on disk, each of one API key: streamed into a temporary file, and moved to their place when whole.

    files/file-…/content, meta.json      a file that is whole
    incoming/                            running uploads; the next start removes those that a crash left

Its methods block; the service calls them on threads. Knows no HTTP, and does not look into the files.
"""

import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import time

from guanaco.models.error_codes import ErrorCode
from guanaco.server.training.jobs.disk import (
    is_id,
    make_directory,
    new_id,
    read_json,
    replace_file,
    sync_directory,
    write_json,
)
from guanaco.server.training.jobs.errors import RefusalKind, RequestRefused, file_not_found, quota, storage_failed
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.records import FILE, RESULTS, TRAINING, StoredFile

MAX_NAME_CHARS = 255


def label_of(filename: str) -> str:
    """A file's name to show: the printable characters of the last part of the client's name. Never used as a path."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(char for char in last if char.isprintable()).strip()
    return shown[:MAX_NAME_CHARS] if shown.strip(".") else "upload.jsonl"


class FileStore:
    """The files below one directory. Methods may be called from any thread."""

    def __init__(self, directory: Path, limits: TrainLimits) -> None:
        self._directory = directory / "files"
        self._incoming = directory / "incoming"
        self._limits = limits
        self._lock = threading.Lock()
        self._files: dict[str, StoredFile] = {}
        self._uploads: dict[str, Upload] = {}

    def open(self) -> None:
        """Find the files that an earlier server kept, and remove its unfinished uploads. Raises OSError."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        make_directory(self._incoming)
        make_directory(self._directory)
        for path in self._directory.iterdir():
            found = read_json(path / "meta.json") if is_id(path.name, FILE) else None
            try:
                file = StoredFile(**(found or {}))
            except TypeError:
                shutil.rmtree(path, ignore_errors=True)  # a move that a crash cut short
                continue
            self._files[file.id] = file

    def of(self, owner: str) -> list[StoredFile]:
        """A key's files, the oldest first."""
        with self._lock:
            mine = [file for file in self._files.values() if file.owner == owner]
        return sorted(mine, key=lambda file: (file.created_at, file.id))

    def get(self, owner: str, file_id: str, param: str | None = None) -> StoredFile:
        """One file of a key. param: the request's field, for the error. Raises RequestRefused if there is none."""
        file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise file_not_found(param)
        return file

    def path(self, file: StoredFile) -> Path:
        """The path of the content."""
        return self._directory / file.id / "content"

    def begin(self, owner: str) -> "Upload":
        """A new upload, which counts among the key's files from now on. Raises RequestRefused."""
        with self._lock:
            num_files, num_bytes = self._used(owner)
            if num_files >= self._limits.max_files_per_key:
                most = self._limits.max_files_per_key
                raise quota(f"this API key has {most} files, the most that it may have: delete some", "file")
            if num_bytes >= self._limits.max_bytes_per_key:
                raise self._too_many_bytes()
            upload = Upload(self, owner, new_id(FILE), self._incoming)
            self._uploads[upload.id] = upload
        return upload

    def reserve(self, upload: "Upload", num_more: int) -> None:
        """Count `num_more` further bytes as the upload's, before they are written.

        Raises RequestRefused if they are too many. The check and the count are one step under the lock, so two uploads
        at a time can't both use the last bytes."""
        if upload.num_bytes + num_more > self._limits.max_file_bytes:
            text = f"the file is larger than {self._limits.max_file_bytes} bytes, the most of one file: split it"
            raise RequestRefused(ErrorCode.REQUEST_TOO_LARGE, text, "file", RefusalKind.TOO_LARGE)
        with self._lock:
            _, used = self._used(upload.owner)
            if used + num_more > self._limits.max_bytes_per_key:
                raise self._too_many_bytes()
            upload.num_bytes += num_more

    def add(self, upload: "Upload", filename: str, purpose: str = TRAINING) -> StoredFile:
        """Keep a whole upload. Raises RequestRefused if the disk fails; the upload is removed then."""
        made = StoredFile(upload.id, upload.owner, upload.num_bytes, int(time()), label_of(filename), purpose)
        target = self._directory / made.id
        try:
            upload.finish()
            make_directory(target)
            upload.path.rename(target / "content")
            write_json(target / "meta.json", asdict(made))
            sync_directory(self._directory)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            raise storage_failed(error) from None
        else:
            with self._lock:  # so that it always counts in the quota, as an upload or as a file
                self._files[made.id] = made
                self._uploads.pop(upload.id, None)
        finally:
            self.drop(upload)
        return made

    def add_result(self, owner: str, filename: str, content: bytes, file_id: str) -> StoredFile:
        """Keep the results of a job whose training has ended as a file of the job's key. It counts in no quota.

        owner: `Owner.digest` of the job's key. filename: only shown to clients. file_id: follows from the job's
        id, so a server that writes the results again after a crash replaces the file. Raises OSError.
        """
        made = StoredFile(file_id, owner, len(content), int(time()), filename, RESULTS)
        target = self._directory / file_id
        make_directory(target)
        replace_file(target / "content", content)  # synced, since the record below says that it is whole
        write_json(target / "meta.json", asdict(made))
        with self._lock:
            self._files[file_id] = made
        return made

    def delete(self, owner: str, file_id: str, in_use: Sequence[str]) -> None:
        """Remove a file. in_use: ids that unfinished jobs read. Raises RequestRefused."""
        file = self.get(owner, file_id)
        if file_id in in_use:
            text = "a fine-tuning job that is not finished reads this file: cancel the job, or wait for its end"
            raise RequestRefused(ErrorCode.FILE_IN_USE, text, None, RefusalKind.CONFLICT)
        with self._lock:
            self._files.pop(file_id, None)
        # The record goes first: if a crash comes between, the next start removes a content without a record.
        with suppress(OSError):
            (self._directory / file.id / "meta.json").unlink()
        shutil.rmtree(self._directory / file.id, ignore_errors=True)

    def remove_results(self, file_ids: Sequence[str]) -> None:
        """Remove the result files with these ids. Uploaded files, and ids without a file, are left alone."""
        for file_id in file_ids:
            file = self._files.get(file_id)
            if file is not None and file.purpose == RESULTS:
                self.delete(file.owner, file_id, ())

    def drop(self, upload: "Upload") -> None:
        """Forget an upload, and remove its temporary file."""
        upload.discard()
        with self._lock:
            self._uploads.pop(upload.id, None)

    def totals(self) -> tuple[int, int]:
        """(number, bytes) of all files."""
        with self._lock:
            return len(self._files), sum(file.bytes for file in self._files.values())

    def _used(self, owner: str) -> tuple[int, int]:
        sizes = [file.bytes for file in self._files.values() if file.owner == owner and file.purpose == TRAINING]
        sizes += [upload.num_bytes for upload in self._uploads.values() if upload.owner == owner]
        return len(sizes), sum(sizes)

    def _too_many_bytes(self) -> RequestRefused:
        most = self._limits.max_bytes_per_key
        return quota(f"the files of this API key may have {most} bytes together: delete some first", "file")


class Upload:
    """A file that is being sent. `write` as the bytes come, then `FileStore.add` or `FileStore.drop`."""

    def __init__(self, store: FileStore, owner: str, file_id: str, directory: Path) -> None:
        self.id = file_id
        self.owner = owner
        self.num_bytes = 0
        self.path = directory / file_id
        self._store = store
        self._handle: int | None = None
        self._lock = threading.Lock()  # a request that is cancelled drops its upload while a thread may still write
        self._is_dropped = False

    def write(self, data: bytes) -> None:
        """Add bytes to the temporary file. Raises RequestRefused if they are too many or the disk is full."""
        self._store.reserve(self, len(data))
        try:
            with self._lock:
                self._write(data)
        except OSError as error:
            raise storage_failed(error) from None

    def _write(self, data: bytes) -> None:
        if self._is_dropped:
            return
        if self._handle is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._handle = os.open(self.path, flags, 0o600)
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]

    def finish(self) -> None:
        """Sync all bytes to the disk and close the file. Raises OSError."""
        if self._handle is None:
            self.path.touch(mode=0o600)
            return
        os.fsync(self._handle)
        os.close(self._handle)
        self._handle = None

    def discard(self) -> None:
        """Close and remove the temporary file, if it is still there."""
        with self._lock, suppress(OSError):
            self._is_dropped = True
            if self._handle is not None:
                handle, self._handle = self._handle, None
                os.close(handle)
            self.path.unlink(missing_ok=True)
