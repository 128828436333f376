"""Opens the files of an adapter's directory, and makes sure that no link leads out of the place the operator named.

Doesn't know their contents. Called by all code that reads an adapter's directory. Every problem is an AdapterError.
"""

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.git_lfs import POINTER_BYTES, POINTER_PROBLEM, is_lfs_pointer


@dataclass(frozen=True)
class AdapterFiles:
    """A directory with an adapter, and the root directory that must contain all its files. Both paths are resolved."""

    directory: Path
    root: Path

    @classmethod
    def find(cls, path: Path, name: str, config_name: str, root: Path | None = None) -> "AdapterFiles":
        """The directory at `path` that holds `config_name`: itself, or its sub-folder called `name`.

        root: a directory that must contain `path` and all files in it, after following links. Without it, `path` itself
        may be or contain links, since the operator wrote it, but its files may not lead out. Hub caches are an
        exception: their files link to blobs in a folder beside. PEFT saves every adapter not called "default" in a
        sub-folder.
        """
        try:
            return cls._find(path, name, config_name, root)
        except OSError as error:
            raise AdapterError(ErrorCode.UNREADABLE, f"{path} cannot be read: {error.strerror}", "path") from None

    @classmethod
    def _find(cls, path: Path, name: str, config_name: str, root: Path | None) -> "AdapterFiles":
        given = Path(os.path.realpath(path))
        confined = None if root is None else Path(os.path.realpath(root))
        if confined is not None and not given.is_relative_to(confined):
            # The answer is the same whether something exists there or not: a client must not learn what lies outside.
            raise AdapterError(
                ErrorCode.OUTSIDE_ROOT, "the path leads out of --adapter-root; name one inside it", "path"
            )
        if not _is_there(given):
            raise AdapterError(ErrorCode.NOT_FOUND, f"there is no directory {path}; check the path", "path")
        if not given.is_dir():
            raise AdapterError(
                ErrorCode.NOT_A_DIRECTORY, f"{path} is no directory; name the one with {config_name}", "path"
            )
        hub_cache = given.parent.name == "snapshots" and given.parent.parent.name.startswith("models--")
        root = confined or (given.parent.parent if hub_cache else given)
        if _is_there(given / config_name):
            return cls(given, root)
        if _is_there(given / name / config_name):
            return cls(given / name, root)
        others = sorted(entry.parent.name for entry in given.glob(f"*/{config_name}"))
        hint = f"; these sub-folders have one: {', '.join(others[:8])}" if others else "; is this a PEFT adapter?"
        raise AdapterError(ErrorCode.CONFIG_MISSING, f"{path} has no {config_name}{hint}", config_name)

    def exists(self, name: str) -> bool:
        """Whether the directory lists `name`; the entry may still be a broken link."""
        return os.path.lexists(self.directory / name)

    def open(self, name: str) -> BinaryIO:
        """Open the regular file `name`, unbuffered.

        Raises AdapterError for anything else, a Git LFS pointer included. Never blocks on a pipe.
        """
        try:
            file = self._open(name)
            if os.fstat(file.fileno()).st_size < POINTER_BYTES:
                is_pointer = is_lfs_pointer(file.read(64))
                file.seek(0)
                if is_pointer:
                    file.close()
                    raise AdapterError(ErrorCode.LFS_POINTER, f"{name} is {POINTER_PROBLEM}", name)
            return file
        except FileNotFoundError:
            raise AdapterError(ErrorCode.NOT_FOUND, f"{self.directory} has no {name}", name) from None
        except OSError as error:
            raise AdapterError(
                ErrorCode.UNREADABLE, f"{self.directory / name} cannot be read: {error.strerror}", name
            ) from None

    def _open(self, name: str) -> BinaryIO:
        target = os.path.realpath(self.directory / name)
        parts = Path(os.path.relpath(target, self.root)).parts
        if ".." in parts:
            problem = f"{name} is a link that leads out of {self.root}; put the file itself there"
            raise AdapterError(ErrorCode.OUTSIDE_ROOT, problem, name)
        # Opens each path component without following links: a component that was swapped for a link after `realpath` is
        # an error.
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                os.close(folder)
                folder = inner
            if not stat.S_ISREG(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
                raise AdapterError(ErrorCode.NOT_A_FILE, f"{self.directory / name} is no regular file", name)
            handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise AdapterError(ErrorCode.NOT_A_FILE, f"{self.directory / name} is no regular file", name)
        return os.fdopen(handle, "rb", buffering=0)

    def read(self, name: str, max_bytes: int) -> bytes:
        """The whole content of a small file. Raises AdapterError if the file is larger than `max_bytes`."""
        with self.open(name) as file:
            data = bytearray()
            while len(data) <= max_bytes:
                chunk = file.read(max_bytes + 1 - len(data))
                if not chunk:
                    return bytes(data)
                data += chunk
        raise AdapterError(ErrorCode.FILE_TOO_LARGE, f"{name} is larger than {max_bytes} bytes", name)


def _is_there(path: Path) -> bool:
    """Whether the directory lists this path, even as a broken link. Raises OSError if the system can't tell."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return False  # no such path can exist
        raise
    return True
