"""A private copy of every adapter version on disk, so that a version never depends on its source again.

A source is read once, into a folder of the store; the copy is what is checked, hashed and served. `<store>/<version>`
appears complete or not at all. Knows no names and no requests. Called by the adapter manager, off the engine thread.
"""

import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.beside import notes_beside
from guanaco.adapters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.adapters.peft.weights import (
    WEIGHTS_NAME,
    AdapterLimits,
    BaseTable,
    LoadedAdapter,
    check_files,
    load_adapter,
)
from guanaco.adapters.versions.holds import Holder, HoldLedger
from guanaco.models.error_codes import ErrorCode

_VERSION = re.compile(r"[0-9a-f]{64}")
_COPY_BYTES = 1 << 20
_Stamp = tuple[int, int, int, int]  # of a file: device, inode, size, time of the last change
OnStage = Callable[[str, float], None]  # called with the name of a load's stage, and its seconds
_INCOMING = ".incoming-"  # folders that are being filled; those of a killed process are removed at start


def _ignore(stage: str, seconds: float) -> None:
    pass


class VersionStore:
    """Adapter versions of one base model below `directory`, which is created if needed. One server owns the
    directory."""

    def __init__(
        self,
        directory: Path,
        targets: dict[str, tuple[int, int]],
        holds: HoldLedger,
        *,
        limits: AdapterLimits | None = None,
        base_table: BaseTable | None = None,
    ) -> None:
        """holds: says which versions must stay. base_table: see `load_adapter`.

        Raises AdapterError if the directory can't be written, or belongs to a running server.
        """
        self.directory = directory
        self._targets = dict(targets)
        self._limits = limits or AdapterLimits()
        self._base_table = base_table
        self._lock = threading.Lock()
        self._holds = holds
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._owner = _own(directory)
            for left in directory.glob(f"{_INCOMING}*"):
                shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            raise _storage_error(directory, error) from None

    def ingest(
        self,
        path: Path,
        *,
        name: str,
        root: Path | None = None,
        keep: bool = True,
        on_stage: OnStage = _ignore,
        version: str | None = None,
    ) -> LoadedAdapter:
        """Copy the adapter at `path` (or in its sub-folder `name`), check the copy, and keep it under its version.

        root: no link may lead out of this directory; None: out of the adapter's own folder. keep: False only checks.
        version: the version that the copy must have; None: any.
        on_stage: called with the seconds of "read" and of "ingest".
        Raises AdapterError for an adapter that can't be served, and for a full disk; then nothing is left on disk. A
        kept version is held as `Holder.LOAD`, and the caller ends that hold.
        """
        started = time.monotonic()
        files = AdapterFiles.find(path, name, CONFIG_NAME, root)
        # Checked before the copy: a bad adapter may have gigabytes, which would be copied in vain.
        check_files(files, self._targets, self._limits)
        try:
            incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self.directory))
            try:
                config = self._copy(files, CONFIG_NAME, incoming, MAX_CONFIG_BYTES)
                weights = self._copy(files, WEIGHTS_NAME, incoming, self._limits.max_file_bytes)
                _check_unchanged(files, {CONFIG_NAME: config, WEIGHTS_NAME: weights})
                copied = time.monotonic()
                on_stage("read", copied - started)
                adapter = self._load(incoming)
                if version is not None and adapter.version != version:
                    problem = f"the copy of version {version[:12]} in the registry has other content; publish it again"
                    raise AdapterError(ErrorCode.VERSION_DAMAGED, problem)
                adapter = replace(adapter, notes=(*adapter.notes, *notes_beside(files)))
                if keep:
                    self._publish(incoming, adapter.version)
                on_stage("ingest", time.monotonic() - copied)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
        except OSError as error:
            raise _storage_error(self.directory, error) from None
        return adapter

    def read(self, version: str) -> LoadedAdapter:
        """The adapter of a stored version. Raises AdapterError if it is gone or was changed."""
        if _VERSION.fullmatch(version) is None or not (self.directory / version).is_dir():
            raise AdapterError(
                ErrorCode.VERSION_MISSING, f"the store has no version {version[:12]}; load the adapter again"
            )
        adapter = self._load(self.directory / version)
        if adapter.version != version:
            problem = f"the stored copy of version {version[:12]} was changed; load the adapter again"
            raise AdapterError(ErrorCode.VERSION_DAMAGED, problem)
        return adapter

    def versions(self) -> frozenset[str]:
        """All stored versions."""
        return frozenset(entry.name for entry in self.directory.iterdir() if _VERSION.fullmatch(entry.name))

    def close(self) -> None:
        """Release the directory for another server."""
        self._owner.close()

    def collect(self) -> None:
        """Remove all versions without a hold. No `ingest` can publish a version meanwhile."""
        with self._lock:
            for version in self.versions() - self._holds.held():
                # Renamed before it is deleted: a folder that is named after a version is always complete, even if the
                # process is killed.
                gone = self.directory / f"{_INCOMING}{version}-gone"
                shutil.rmtree(gone, ignore_errors=True)
                with suppress(OSError):
                    (self.directory / version).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _load(self, folder: Path) -> LoadedAdapter:
        return load_adapter(folder, self._targets, limits=self._limits, base_table=self._base_table)

    def _copy(self, files: AdapterFiles, name: str, to: Path, max_bytes: int) -> _Stamp:
        """Copy a file. Returns its stamp from before the copy."""
        with files.open(name) as source, (to / name).open("wb") as target:
            stamp, size = _stamp(source), 0
            while chunk := _read(source, name):
                size += len(chunk)
                if size > max_bytes:
                    raise AdapterError(ErrorCode.FILE_TOO_LARGE, f"{name} is larger than {max_bytes} bytes", name)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        return stamp

    def _publish(self, incoming: Path, version: str) -> None:
        """Give the folder `incoming` its version's name. An intact copy stays instead: a crash between two renames
        would lose both."""
        final, old = self.directory / version, self.directory / f"{incoming.name}-old"
        sync_directory(incoming)
        is_intact = self._is_intact(version)
        with self._lock:
            if not (is_intact and final.exists()):
                if final.exists():
                    final.rename(old)
                incoming.rename(final)
            self._holds.take(version, Holder.LOAD)
        try:
            sync_directory(self.directory)
        except OSError:
            self._holds.give_back(version, Holder.LOAD)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _is_intact(self, version: str) -> bool:
        try:
            self.read(version)
        except AdapterError:
            return False
        return True


def _stamp(file: BinaryIO) -> _Stamp:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(source: BinaryIO, name: str) -> bytes:
    try:
        return source.read(_COPY_BYTES)
    except OSError as error:
        raise AdapterError(ErrorCode.UNREADABLE, f"{name} cannot be read: {error.strerror}", name) from None


def _check_unchanged(files: AdapterFiles, stamps: dict[str, _Stamp]) -> None:
    """Raises AdapterError if a source file changed meanwhile: the copy would be half one version, half another."""
    for name, stamp in stamps.items():
        with files.open(name) as again:
            if _stamp(again) != stamp:
                problem = f"{name} was changed or exchanged while it was read; load it again when that is done"
                raise AdapterError(ErrorCode.CHANGED_WHILE_READING, problem, name)


def _own(directory: Path) -> BinaryIO:
    """The lock of a directory, held until the process ends or the file is closed.

    Raises AdapterError if another server has it: each of the two would remove the versions that only the other one
    knows.
    """
    file = (directory / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        problem = f"the adapter store {directory} belongs to another server that runs; choose another --adapter-store"
        raise AdapterError(ErrorCode.STORE_IN_USE, problem) from None
    return file


def sync_directory(path: Path) -> None:
    """Make a directory's entries survive a crash."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage_error(directory: Path, error: OSError) -> AdapterError:
    problem = f"the adapter store {directory} cannot be used: {error.strerror or error}; free some space, or repair it"
    return AdapterError(ErrorCode.STORE_FAILED, problem)
