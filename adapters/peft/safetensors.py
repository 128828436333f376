"""One adapter's safetensors file: the common reader with its strictest rules, and refusals with an error code.

Knows nothing of LoRA. Called by `weights`, by the last check of a conversion and by `guanaco adapters inspect`.
"""

import os
from collections.abc import Container, Iterator
from typing import BinaryIO

from torch import Tensor

from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.raw_file import OpenFile
from guanaco.models.formats.safetensors import SafetensorsReader
from guanaco.models.formats.safetensors_header import HeaderRules, SafetensorsError

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096  # LLaMA-65B with all seven projections has 80 · 7 · 2 = 1120
DTYPES = ("F32", "F16", "BF16")
_RULES = HeaderRules(DTYPES, f"adapters may use {', '.join(DTYPES)}", MAX_HEADER_BYTES, MAX_TENSORS)


class _AdapterFile(OpenFile):
    """The open file. Messages use `name`, since clients must not learn its path."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._stat = os.fstat(file.fileno())
        super().__init__(file, self._stat.st_size)
        self._name = name

    def ended(self, offset: int) -> AdapterError:  # noqa: ARG002 - the client needs no offset
        return AdapterError(ErrorCode.TRUNCATED, f"{self._name} ended while it was read", self._name)

    def failed(self, error: OSError) -> AdapterError:
        return AdapterError(ErrorCode.UNREADABLE, f"{self._name} cannot be read: {error.strerror}", self._name)

    def check_unchanged(self) -> None:
        """Raises AdapterError if the file was written to after it was opened."""
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            problem = f"{self._name} was written to while it was read; load it again when that is done"
            raise AdapterError(ErrorCode.CHANGED_WHILE_READING, problem, self._name)


class AdapterTensors(SafetensorsReader):
    """An open file with its header read: `tensors` in the order of their bytes, `metadata` as written.

    Raises AdapterError for a file that is not in the safetensors format, is damaged, or exceeds a limit.
    """

    def __init__(self, file: BinaryIO, name: str, max_bytes: int) -> None:
        self._source = _AdapterFile(file, name)
        if (size := self._source.num_bytes) > max_bytes:
            raise AdapterError(ErrorCode.FILE_TOO_LARGE, f"{name} has {size} bytes; the limit is {max_bytes}", name)
        try:
            super().__init__(self._source, name, _RULES)
        except SafetensorsError as error:
            raise AdapterError(error.code, str(error), error.field) from None
        self.tensors = dict(sorted(self.tensors.items(), key=lambda item: item[1].offset))

    def read_all(self, *, without: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """As in the common reader. Raises AdapterError if the file shrinks or is written to meanwhile."""
        yield from super().read_all(without=without)
        self._source.check_unchanged()
