"""One adapter's safetensors file: a header that is checked in full, then plain reads into memory of our own.

Stricter than the format (sizes, dtypes, no empty or repeated tensors) and never mapped: truncating a mapped file
kills the process. Knows nothing of LoRA. Called by `weights`.
"""

import math
import os
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from guanaco.adapters.errors import AdapterError, printable
from guanaco.adapters.peft.strict_json import JsonError, parse_object
from guanaco.kernels.memory import mapped_zeros
from guanaco.models.error_codes import ErrorCode

MAX_HEADER_BYTES = 1 << 20
_ALIGNMENT = 64  # a cache line
MAX_TENSORS = 4096  # LLaMA-65B with all seven projections has 80 · 7 · 2 = 1120
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the header; `start` counts from the first byte after it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """An open file whose header has been read: `tensors` in the order of their bytes, `metadata` as the writer left it.

    Raises AdapterError for a file that is no safetensors, is damaged, or exceeds a limit.
    """

    def __init__(self, file: BinaryIO, name: str, max_bytes: int) -> None:
        self._file = file
        self._name = name
        self._stat = os.fstat(file.fileno())
        size = self._stat.st_size
        if size > max_bytes:
            raise AdapterError(ErrorCode.FILE_TOO_LARGE, f"{name} has {size} bytes; the limit is {max_bytes}", name)
        self._data_start = 8 + self._header_length(size)
        header = self._header()
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            raise AdapterError(
                ErrorCode.TOO_MANY_TENSORS, f"{name} lists {len(header)} tensors; the limit is {MAX_TENSORS}", name
            )
        entries = {tensor: _entry(tensor, entry) for tensor, entry in header.items()}
        self.tensors = dict(sorted(entries.items(), key=lambda item: item[1].start))
        self._check_layout(size - self._data_start)

    def read(self, *, without: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in file order, but those called in `without`. They share one piece of memory, so that a large
        file's is in huge pages: a core's page tables don't hold the small pages of eight adapters (their layers
        cost 4 % more).

        Raises AdapterError if the file shrinks or is written to meanwhile.
        """
        wanted = {name: stored for name, stored in self.tensors.items() if name not in without}
        total = sum(_aligned(stored.num_bytes) for stored in wanted.values())
        whole = mapped_zeros((total,), torch.uint8, huge=True)
        place = 0
        for name, stored in wanted.items():
            self._file.seek(self._data_start + stored.start)
            data = whole[place : place + stored.num_bytes]
            place += _aligned(stored.num_bytes)
            self._read_into(memoryview(data.numpy()))  # type: ignore[arg-type]
            yield name, data.view(stored.dtype).view(stored.shape)
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            problem = f"{self._name} was written to while it was read; load it again when that is done"
            raise AdapterError(ErrorCode.CHANGED_WHILE_READING, problem, self._name)

    def _header_length(self, size: int) -> int:
        if size < 8:
            raise AdapterError(
                ErrorCode.NOT_SAFETENSORS, f"{self._name} has {size} bytes: it is no safetensors file", self._name
            )
        prefix = bytearray(8)
        self._read_into(memoryview(prefix))
        length = int(struct.unpack("<Q", prefix)[0])
        if length > size - 8:
            problem = f"{self._name} is truncated or no safetensors file: the header would have {length} bytes"
            raise AdapterError(ErrorCode.NOT_SAFETENSORS, problem, self._name)
        if length > MAX_HEADER_BYTES:
            problem = f"the header of {self._name} has {length} bytes; the limit is {MAX_HEADER_BYTES}"
            raise AdapterError(ErrorCode.HEADER_TOO_LARGE, problem, self._name)
        return length

    def _header(self) -> dict[str, object]:
        data = bytearray(self._data_start - 8)
        self._read_into(memoryview(data))
        try:
            return parse_object(bytes(data))
        except JsonError as error:
            raise AdapterError(ErrorCode.BAD_HEADER, f"the header of {self._name} {error}", self._name) from None

    def _metadata(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise AdapterError(
                ErrorCode.BAD_HEADER, f"__metadata__ of {self._name} is no table of strings", "__metadata__"
            )
        return value

    def _check_layout(self, data_bytes: int) -> None:
        """The tensors must fill the rest of the file: no hole, no overlap, nothing behind."""
        if not self.tensors:
            raise AdapterError(
                ErrorCode.EMPTY, f"{self._name} holds no tensor: the adapter was not saved properly", self._name
            )
        position = 0
        for name, stored in self.tensors.items():
            if stored.start != position:
                problem = f"{printable(name)} starts at byte {stored.start} of the data, where {position} was due"
                raise AdapterError(ErrorCode.BAD_LAYOUT, problem, printable(name))
            position += stored.num_bytes
        if position > data_bytes:
            raise AdapterError(
                ErrorCode.TRUNCATED, f"{self._name} has {data_bytes} of {position} bytes of data", self._name
            )
        if position < data_bytes:
            problem = f"{self._name} has {data_bytes - position} bytes that belong to no tensor"
            raise AdapterError(ErrorCode.BAD_LAYOUT, problem, self._name)

    def _read_into(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            except OSError as error:
                raise AdapterError(
                    ErrorCode.UNREADABLE, f"{self._name} cannot be read: {error.strerror}", self._name
                ) from None
            if not count:
                raise AdapterError(ErrorCode.TRUNCATED, f"{self._name} ended while it was read", self._name)
            done += count


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _entry(name: str, entry: object) -> StoredTensor:
    """One header entry. Arithmetic is Python's: nothing here can overflow."""
    shown = printable(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(ErrorCode.BAD_HEADER, f"{shown} has no entry of dtype, shape and data_offsets", shown)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise AdapterError(ErrorCode.BAD_HEADER, f"{shown} has a shape or data_offsets that are no sizes", shown)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        problem = f"{shown} is stored as {printable(str(dtype))}; adapters may use {', '.join(DTYPES)}"
        raise AdapterError(ErrorCode.DTYPE_UNSUPPORTED, problem, shown)
    if 0 in shape:
        raise AdapterError(
            ErrorCode.EMPTY_TENSOR, f"{shown} has shape {shape}: sharded weights that were not gathered?", shown
        )
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if num_bytes != offsets[1] - offsets[0]:
        problem = f"{shown} of shape {shape} takes {num_bytes} bytes, but {offsets[1] - offsets[0]} are set aside"
        raise AdapterError(ErrorCode.BAD_LAYOUT, problem, shown)
    return StoredTensor(DTYPES[dtype], tuple(shape), offsets[0], num_bytes)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in value)
