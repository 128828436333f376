"""The head of a GGUF file: its metadata as Python values, and where each tensor is.

This part has a reader of our own: the gguf package's maps the file (see `raw_file`), and takes half a minute and more
than a gigabyte for the vocabulary of a LLaMA 3. The package still decodes tensors. Called by `gguf_checkpoint` and
`gguf_tokenizer`.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from guanaco.models.errors import ModelError
from guanaco.models.formats.raw_file import RawFile

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 8  # tensors of the format have at most four
MAX_HEAD_BYTES = 64 << 20  # 262,144 tokens with their merges take 15 MB; as Python's values up to 16 times as much
# Type numbers of metadata values (the GGUF specification, "gguf_metadata_value_type"), as formats of `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in torch
    offset: int  # bytes from the start of the file
    num_bytes: int


def read_table(file: RawFile) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors by name. Raises ModelError if the file is damaged, truncated, or no GGUF of version 2 or
    3."""
    try:
        with file.path.open("rb") as stream:
            return _Reader(stream, file).read()
    except OSError as error:
        raise ModelError(f"{file.path} cannot be read ({error.strerror}): check the disk") from error
    except (ValueError, RecursionError) as error:  # text that is not UTF-8, or arrays nested too deeply
        raise file.damaged(f"its metadata make no sense ({error})") from error


class _Reader:
    """Reads from the start of the file on. It refuses every length that goes beyond the file's end."""

    def __init__(self, stream: BinaryIO, file: RawFile) -> None:
        self._stream = stream
        self._file = file
        self._left = file.num_bytes
        self._head_left = MAX_HEAD_BYTES

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._left < 24 or self._bytes(4) != _MAGIC:
            raise self._file.damaged("it does not start as a GGUF file does")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ModelError(f"{self._file.path}: GGUF version {version} is not supported: convert the model again")
        num_tensors, num_values = self._count(24), self._count(12)
        metadata = self._table(num_values, lambda: self._value(self._scalar("I")))
        stored = self._table(num_tensors, self._tensor)
        start = self._file.num_bytes - self._left
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._file.damaged(f"general.alignment is {alignment!r}")
        start += -start % alignment
        tensors = {
            name: GgufTensor(kind, shape, start + offset, size) for name, (kind, shape, offset, size) in stored.items()
        }
        end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
        if end > self._file.num_bytes:
            raise self._file.damaged(f"it is truncated: {self._file.num_bytes} of {end} bytes are there")
        return metadata, tensors

    def _table(self, count: int, read_entry: Callable[[], Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(count):
            name = self._string()
            if name in entries:
                raise self._file.damaged(f"{name} occurs twice")
            entries[name] = read_entry()
        return entries

    def _tensor(self) -> tuple[Any, tuple[int, ...], int, int]:
        """(type, shape, offset in bytes from the start of the data, bytes) of the next tensor."""
        num_dims = self._scalar("I")
        if num_dims > _MAX_DIMS:
            raise self._file.damaged(f"a tensor has {num_dims} dimensions")
        dims = struct.unpack(f"<{num_dims}Q", self._bytes(8 * num_dims))
        number, offset = self._scalar("I"), self._scalar("Q")
        import gguf  # here, because a start from safetensors does without it

        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ModelError(
                f"{self._file.path}: a tensor has type {number}, which the gguf package does not know; "
                "give a file with another quantisation"
            ) from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if dims and dims[0] % block_size:
            raise self._file.damaged(f"a row of {dims[0]} values in {kind.name}")
        return kind, tuple(reversed(dims)), offset, math.prod(dims) // block_size * block_bytes

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._format(kind))
        item = self._scalar("I")
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(self._count(8))]
        code = self._format(item)
        count = self._count(struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(code))))

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._file.damaged(f"a value has type {kind}")
        return _SCALARS[kind]

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")

    def _count(self, smallest_bytes: int) -> int:
        """The number of entries that follow, each of at least `smallest_bytes`. Raises ModelError if they can't fit."""
        count: int = self._scalar("Q")
        self._check_head(count * smallest_bytes)
        if count * smallest_bytes > self._left:
            raise self._file.damaged(f"it ends before the {count} entries that it announces")
        return count

    def _check_head(self, num_bytes: int) -> None:
        if self._head_left < num_bytes <= self._left:
            raise self._file.damaged(f"its metadata and table of tensors take more than {MAX_HEAD_BYTES >> 20} MiB")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise self._file.damaged(f"it ends {count - self._left} bytes before the end of its metadata")
        self._check_head(count)
        self._left -= count
        self._head_left -= count
        data = self._stream.read(count)
        if len(data) != count:
            raise self._file.damaged("it became shorter while it was read")
        return data
