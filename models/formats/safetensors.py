"""One safetensors file: its header checked before anything is allocated, its tensors read one by one.

Our own reader rather than the library's, which maps the file (see `raw_file`), and which says less about what is wrong.
Knows nothing of models. Called by `checkpoint` and `quantize`.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels.memory import mapped_zeros
from guanaco.models.formats.raw_file import FileLayout, RawFile

# The header of a large model is 100 kB; as Python's values it takes up to 25 times as much. The format allows 100 MB.
MAX_HEADER_BYTES = 16 << 20
_MAX_DIMS = 8

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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """An open safetensors file; `tensors` is its table of contents."""

    def __init__(self, path: Path) -> None:
        """Open and check `path`. Raises ModelError for a file that is absent, truncated or no safetensors."""
        self.path = path
        self._file = RawFile(path)
        try:
            self._header = self._read_header()
            self.tensors = self._parse_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own. Raises ModelError if the file has become shorter since it was opened."""
        stored = self.tensors[name]
        data = mapped_zeros((stored.num_bytes,), torch.uint8, huge=True)
        self._file.read_into(stored.offset, data.numpy())
        return data.view(stored.dtype).view(stored.shape)

    def layout(self) -> FileLayout:
        spans = tuple((tensor.offset, tensor.num_bytes) for tensor in self.tensors.values())
        return FileLayout(self.path, self._header, spans)

    def _read_header(self) -> bytes:
        if self._file.num_bytes < 8:
            raise self._file.damaged(f"it has {self._file.num_bytes} bytes")
        (length,) = struct.unpack("<Q", self._file.read_bytes(0, 8))
        if length > min(MAX_HEADER_BYTES, self._file.num_bytes - 8):
            raise self._file.damaged("it does not start with a safetensors header")
        return self._file.read_bytes(8, length)

    def _parse_header(self) -> dict[str, StoredTensor]:
        start = 8 + len(self._header)
        try:
            header = json.loads(self._header, object_pairs_hook=_unique_keys)
            header.pop("__metadata__", None)
            tensors = {name: _parse_entry(entry, start) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._file.damaged(f"its header makes no sense ({error})") from error
        end = max((t.offset + t.num_bytes for t in tensors.values()), default=start)
        if end > self._file.num_bytes:
            raise self._file.damaged(f"it is truncated: {self._file.num_bytes} of {end} bytes are there")
        return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _parse_entry(entry: dict[str, Any], start: int) -> StoredTensor:
    dtype = DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if len(shape) > _MAX_DIMS:
        raise ValueError(f"a tensor has {len(shape)} dimensions")
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 63 for n in (*shape, first, last)):
        raise ValueError("a size or an offset is no whole number")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {list(shape)} of {entry['dtype']} does not fit {last - first} bytes")
    return StoredTensor(dtype, shape, start + first, last - first)
