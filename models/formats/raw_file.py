"""A weights file read with plain reads into memory of our own.

Not through mmap: a file that is truncated under a map kills the process (SIGBUS), and mapped pages count towards our
memory. Knows no format. Called by the readers of both formats.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guanaco.models.errors import ModelError
from guanaco.models.formats.git_lfs import POINTER_BYTES, POINTER_PROBLEM, is_lfs_pointer


class RawFile:
    """An open file; `num_bytes` is its size when it was opened."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if `path` cannot be opened, or is a Git LFS pointer."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self.num_bytes = path.stat().st_size
            is_pointer = self.num_bytes < POINTER_BYTES and is_lfs_pointer(self._file.read(64))
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
        if is_pointer:
            self.close()
            raise ModelError(f"{path} is {POINTER_PROBLEM}")

    def close(self) -> None:
        self._file.close()

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer of bytes from `offset`. Raises ModelError where the file ends or fails before."""
        view = memoryview(buffer)
        try:
            self._file.seek(offset)
            done = 0
            while done < len(view):  # one call reads 2 GiB at most
                count = self._file.readinto(view[done:])
                if not count:
                    raise self.damaged(f"it ends at byte {offset + done}, where tensor data should be")
                done += count
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error.strerror}): check the disk") from error

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` from `offset`, as bytes."""
        data = bytearray(num_bytes)
        self.read_into(offset, data)
        return bytes(data)

    def damaged(self, problem: str) -> ModelError:
        """The refusal of this file; `problem` says what is wrong with it."""
        return ModelError(f"{self.path} is damaged: {problem}; delete it and download or copy it again")


@dataclass(frozen=True)
class FileLayout:
    """What a weights file holds, without its content: what the model cache recognises it by."""

    path: Path
    table: bytes  # names, dtypes, shapes, in a form that is the same for the same table
    spans: tuple[tuple[int, int], ...]  # (offset, bytes) of each tensor
