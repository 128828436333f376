"""A weights file read with plain reads into memory of our own.

It is not mapped: a mapped file that is truncated kills the process (SIGBUS), and mapped pages count towards our memory.
Knows no format. Called by the readers of safetensors and GGUF.
"""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from guanaco.models.errors import GuanacoError, ModelError
from guanaco.models.formats.git_lfs import POINTER_BYTES, POINTER_PROBLEM, is_lfs_pointer


class OpenFile(ABC):
    """Reads of an open, unbuffered file. A subclass decides which exception a failed read raises."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self.num_bytes = num_bytes  # size when the file was opened
        self._lock = threading.Lock()  # over the file's position: weights are read on several threads

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer with the bytes from `offset` on. Raises the error that `ended` returns if the file is
        too short, and that of `failed` if it can't be read."""
        view = memoryview(buffer)
        try:
            with self._lock:
                self._file.seek(offset)
                done = 0
                while done < len(view):  # one call reads 2 GiB at most
                    count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise self.ended(offset + done)
                    done += count
        except OSError as error:
            raise self.failed(error) from error

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` from `offset`, as bytes."""
        data = bytearray(num_bytes)
        self.read_into(offset, data)
        return bytes(data)

    @abstractmethod
    def ended(self, offset: int) -> GuanacoError:
        """The error for a file that ends at `offset`, although more data should follow."""

    @abstractmethod
    def failed(self, error: OSError) -> GuanacoError:
        """The error for a file that cannot be read."""


class RawFile(OpenFile):
    """A file of a model. All its failures are ModelErrors."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if `path` cannot be opened, or is a Git LFS pointer."""
        self.path = path
        try:
            super().__init__(path.open("rb", buffering=0), path.stat().st_size)
            is_pointer = self.num_bytes < POINTER_BYTES and is_lfs_pointer(self._file.read(64))
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from error
        if is_pointer:
            self.close()
            raise ModelError(f"{path} is {POINTER_PROBLEM}")

    def close(self) -> None:
        self._file.close()

    def ended(self, offset: int) -> ModelError:
        return self.damaged(f"it ends at byte {offset}, where tensor data should be")

    def failed(self, error: OSError) -> ModelError:
        return ModelError(f"{self.path} cannot be read ({error.strerror}): check the disk")

    def damaged(self, problem: str) -> ModelError:
        """The refusal of this file; `problem` says what is wrong with it."""
        return ModelError(f"{self.path} is damaged: {problem}; delete it and download or copy it again")


@dataclass(frozen=True)
class FileLayout:
    """The layout of a weights file, without its content. The model cache makes its key from it."""

    path: Path
    table: bytes  # names, dtypes, shapes, in a form that is the same for the same table
    spans: tuple[tuple[int, int], ...]  # (offset, bytes) of each tensor
