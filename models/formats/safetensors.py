"""One safetensors file: its header checked before anything is allocated, its tensors read into memory of our own.

It is never mapped (see `raw_file`). Knows nothing of models or adapters: the caller gives the rules and exceptions.
Called by the loading of models and by the reader of adapters.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from guanaco.kernels.memory import mapped_zeros
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.raw_file import FileLayout, OpenFile, RawFile
from guanaco.models.formats.safetensors_header import HeaderRules, SafetensorsError, read_header

# The header of a large model is 100 kB; as Python's values it takes up to 25 times as much. The format allows 100 MB.
MAX_HEADER_BYTES = 16 << 20
_ALIGNMENT = 64  # a cache line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MODEL_RULES = HeaderRules(
    tuple(DTYPES), f"models may use {', '.join(DTYPES)}", max_header_bytes=MAX_HEADER_BYTES, is_strict=False
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsReader:
    """The tensors of an open file whose header has been read."""

    def __init__(self, file: OpenFile, name: str, rules: HeaderRules) -> None:
        """Raises SafetensorsError for a header that breaks the rules, and the errors of `file` if a read fails."""
        self._file = file
        self._header = read_header(file.read_bytes, file.num_bytes, name, rules)
        self.metadata = self._header.metadata
        self.tensors = {
            tensor: StoredTensor(DTYPES[entry.dtype], entry.shape, entry.offset, entry.num_bytes)
            for tensor, entry in self._header.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own. Raises the errors of the file, for example if it was cut meanwhile."""
        stored = self.tensors[name]
        data = mapped_zeros((stored.num_bytes,), torch.uint8, huge=True)
        return self._fill(data, stored)

    def read_all(self, *, without: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """All tensors, in the order of `tensors`, except those named in `without`.

        They share one piece of memory, so that a large file gets huge pages. With small pages, the layers of eight
        adapters took 4 % longer, since a core's page cache (TLB) cannot hold so many.
        """
        wanted = {name: stored for name, stored in self.tensors.items() if name not in without}
        whole = mapped_zeros((sum(_aligned(stored.num_bytes) for stored in wanted.values()),), torch.uint8, huge=True)
        place = 0
        for name, stored in wanted.items():
            yield name, self._fill(whole[place : place + stored.num_bytes], stored)
            place += _aligned(stored.num_bytes)

    def _fill(self, data: Tensor, stored: StoredTensor) -> Tensor:
        self._file.read_into(stored.offset, data.numpy())
        return data.view(stored.dtype).view(stored.shape)


class SafetensorsFile(SafetensorsReader):
    """A safetensors file of a model. All its failures are ModelErrors."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`. Raises ModelError for a file that is absent, truncated or no safetensors."""
        self.path = path
        file = RawFile(path)
        try:
            super().__init__(file, path.name, _MODEL_RULES)
        except SafetensorsError as error:
            file.close()
            raise file.damaged(_PROBLEMS.get(error.code, "its header makes no sense ({})").format(error)) from error
        except BaseException:
            file.close()
            raise
        self._raw = file

    def close(self) -> None:
        self._raw.close()

    def layout(self) -> FileLayout:
        """The file's layout, from which the model cache makes its key."""
        spans = tuple((tensor.offset, tensor.num_bytes) for tensor in self.tensors.values())
        return FileLayout(self.path, self._header.raw, spans)


_PROBLEMS = {
    ErrorCode.NOT_SAFETENSORS: "it does not start with a safetensors header ({})",
    ErrorCode.HEADER_TOO_LARGE: "it does not start with a safetensors header ({})",
    ErrorCode.TRUNCATED: "{}",
}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
