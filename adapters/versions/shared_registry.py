"""A directory through which several servers of one base share adapters: a list of names, and the versions in the list.

A change replaces `list.json` as a whole; a folder `versions/<version>` appears only when it is complete. So a reader
needs no lock. A writer holds the directory's lock while it reads, changes and writes the list, so no change of another
server is lost. Knows no tensors and no requests. All calls block; `server.adapters.sharing` makes them on a thread.
"""

import errno
import fcntl
import filecmp
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME
from guanaco.adapters.peft.weights import WEIGHTS_NAME
from guanaco.adapters.versions.registry_file import RegistryFile, SavedList
from guanaco.adapters.versions.store import sync_directory
from guanaco.models.error_codes import ErrorCode

LIST_NAME = "list.json"
# How long a version stays after its name left the list: another server may just be copying it.
UNNAMED_SECONDS = 600.0
_INCOMING = ".incoming-"  # folders that are being filled, or removed
_TRIES = 4
_FILES = (CONFIG_NAME, WEIGHTS_NAME)
_Stamp = tuple[int, ...]


class SharedRegistry:
    """The shared directory of one base model; it need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = RegistryFile(directory / LIST_NAME, mode=0o644)  # servers may run as other users
        self._versions = directory / "versions"
        self._stamp: _Stamp | None = None  # of the list that was read or written last
        self._list = SavedList()

    def read(self) -> SavedList:
        """The list as it is now; empty if nobody has written one yet. Reads the file only if it has changed.

        Raises AdapterError if it can't be read, is damaged, or was there before and is gone.
        """
        try:
            # NFS looks at the server's file when it is opened, but answers `stat` from a cache of many seconds.
            with self._file.path.open("rb") as file:
                if (stamp := _stamp(file)) != self._stamp:
                    self._list = self._file.read_list(file)
                    self._stamp = stamp
        except FileNotFoundError:
            if self._stamp is not None:
                problem = f"{self._file.path} is gone; bring it back, or change an adapter: that writes it anew"
                raise AdapterError(ErrorCode.REGISTRY_FAILED, problem) from None
        except OSError as error:
            problem = f"{self._file.path} cannot be read: {error.strerror}"
            raise AdapterError(ErrorCode.REGISTRY_FAILED, problem) from None
        except AdapterError as error:
            raise AdapterError(ErrorCode.REGISTRY_FAILED, str(error)) from None
        return self._list

    def read_to_change(self) -> SavedList:
        """As `read`, for a writer: if the list is gone, returns the list that this server read last."""
        if self._stamp is not None and not self._file.path.exists():
            return self._list
        return self.read()

    def folder(self, version: str) -> Path:
        """The folder of a version; it need not exist."""
        return self._versions / version

    def try_lock(self) -> BinaryIO | None:
        """Lock the list until the returned file is closed; None if another server has the lock. Raises AdapterError."""
        try:
            self._versions.mkdir(parents=True, exist_ok=True)
            file = (self.directory / ".lock").open("ab")
        except OSError as error:
            raise self._failed(error) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise self._failed(error) from None
        return file

    def add_version(self, version: str, source: Path) -> None:
        """Copy the files in `source` as a version, unless it already has the same files. Raises AdapterError."""
        final = self.folder(version)
        try:
            if _refreshed(source, final):
                return
            self._versions.mkdir(parents=True, exist_ok=True)
            incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._versions))
            try:
                incoming.chmod(0o755)  # servers may run as other users
                for name in _FILES:
                    _copy(source / name, incoming / name)
                sync_directory(incoming)
                self._put(incoming, final)
                sync_directory(self._versions)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
        except OSError as error:
            raise self._failed(error) from None

    def _put(self, incoming: Path, final: Path) -> None:
        """Rename a folder to its final name. A folder of this name is replaced, unless it has the same files."""
        for _ in range(_TRIES):
            try:
                incoming.rename(final)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if _refreshed(incoming, final):
                return
            self._move_away(final)
        raise OSError(errno.EEXIST, f"{final.name} changes all the time")

    def has_version(self, version: str) -> bool:
        """Whether the folder of a version is there."""
        return self.folder(version).is_dir()

    def write(self, changed: SavedList) -> SavedList:
        """Replace the list, and remove versions that it no longer names. The caller holds the lock.

        Returns the list with its generation. Raises AdapterError; then the old list is still there.
        """
        changed = replace(changed, generation=changed.generation + 1)
        try:
            self._file.write_list(changed)
            with self._file.path.open("rb") as file:
                self._list, self._stamp = changed, _stamp(file)
                now = os.fstat(file.fileno()).st_mtime  # by the clock of the directory's server
        except OSError as error:
            raise self._failed(error) from None
        with suppress(OSError):
            self._remove_unnamed(changed.versions, now)
        return changed

    def _remove_unnamed(self, named: frozenset[str], now: float) -> None:
        for entry in self._versions.iterdir():
            if entry.name in named or now - entry.stat().st_mtime < UNNAMED_SECONDS:
                continue
            self._move_away(entry)

    def _move_away(self, folder: Path) -> None:
        """Remove a folder if it exists. Its name is free at once."""
        gone = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self._versions))
        with suppress(FileNotFoundError):
            folder.rename(gone / folder.name)
        shutil.rmtree(gone, ignore_errors=True)

    def _failed(self, error: OSError) -> AdapterError:
        problem = f"the adapter registry {self.directory} cannot be changed: {error.strerror or error}; nothing changed"
        return AdapterError(ErrorCode.REGISTRY_FAILED, problem)


def _stamp(file: BinaryIO) -> _Stamp:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _refreshed(source: Path, folder: Path) -> bool:
    """Whether a folder has the same files. Its time is set to now, so another server's `write` does not delete it as
    unnamed."""
    try:
        with suppress(PermissionError):  # the folder may be another user's
            os.utime(folder)
        return all(filecmp.cmp(source / name, folder / name, shallow=False) for name in _FILES)
    except FileNotFoundError:
        return False


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
