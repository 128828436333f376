"""The header of a safetensors file, checked in full before anything is allocated: names, dtypes, shapes, places.

The library's own reader says less about what is wrong. Imports neither torch nor numpy, since the restricted process
that converts adapters uses it, too. Called by `safetensors` and that process.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.models.formats.shown import printable
from guanaco.models.formats.strict_json import JsonError, parse_object

# The format's name of a dtype → bytes per element.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_DIMS = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsError(GuanacoError):
    """A header that is refused. `field` is the tensor or the file at fault; the message names it."""

    def __init__(self, code: ErrorCode, message: str, field: str) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


@dataclass(frozen=True)
class HeaderRules:
    """The rules for one kind of file. `dtype_advice` ends the message about a dtype that is not allowed.

    is_strict: refuse unknown fields, metadata that are no strings, empty tensors, and bytes that belong to no tensor or
    to several. Otherwise unknown fields and other metadata are ignored, and the tensors need only lie within the file.
    """

    dtypes: tuple[str, ...]
    dtype_advice: str
    max_header_bytes: int
    max_tensors: int | None = None
    is_strict: bool = True


@dataclass(frozen=True)
class Entry:
    """One tensor: the format's name of its dtype, its shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """`tensors` are in the header's own order; `raw` is the header as it is written."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    raw: bytes


def read_header(read: Callable[[int, int], bytes], size: int, name: str, rules: HeaderRules) -> Header:
    """The header of a file of `size` bytes, called `name` in messages. `read` returns bytes from an offset on.

    Raises SafetensorsError for a file that is no safetensors file, is truncated, or breaks the rules.
    """
    if size < 8:
        raise SafetensorsError(ErrorCode.NOT_SAFETENSORS, f"{name} has {size} bytes: it is no safetensors file", name)
    length = int(struct.unpack("<Q", read(0, 8))[0])
    if length > size - 8:
        problem = f"{name} is truncated or no safetensors file: the header would have {length} bytes"
        raise SafetensorsError(ErrorCode.NOT_SAFETENSORS, problem, name)
    if length > rules.max_header_bytes:
        problem = f"the header of {name} has {length} bytes; the limit is {rules.max_header_bytes}"
        raise SafetensorsError(ErrorCode.HEADER_TOO_LARGE, problem, name)
    raw = read(8, length)
    try:
        fields = parse_object(raw)
    except JsonError as error:
        raise SafetensorsError(ErrorCode.BAD_HEADER, f"the header of {name} {error}", name) from None
    metadata = _metadata(fields.pop("__metadata__", {}), name, rules)
    if rules.max_tensors is not None and len(fields) > rules.max_tensors:
        problem = f"{name} lists {len(fields)} tensors; the limit is {rules.max_tensors}"
        raise SafetensorsError(ErrorCode.TOO_MANY_TENSORS, problem, name)
    start = 8 + length
    tensors = {tensor: _entry(tensor, entry, start, rules) for tensor, entry in fields.items()}
    if rules.is_strict:
        _check_whole(tensors, start, size, name)
    elif (end := max((t.offset + t.num_bytes for t in tensors.values()), default=start)) > size:
        problem = f"{name} is truncated: {size} of {end} bytes are there"
        raise SafetensorsError(ErrorCode.TRUNCATED, problem, name)
    return Header(tensors, metadata, raw)


def _metadata(value: object, name: str, rules: HeaderRules) -> dict[str, str]:
    if isinstance(value, dict):
        texts = {key: text for key, text in value.items() if isinstance(text, str)}
        if texts.keys() == value.keys() or not rules.is_strict:
            return texts
    elif not rules.is_strict:
        return {}
    raise SafetensorsError(ErrorCode.BAD_HEADER, f"__metadata__ of {name} is no table of strings", "__metadata__")


def _entry(name: str, entry: Any, start: int, rules: HeaderRules) -> Entry:
    """One header entry, checked. start: the byte where the data begin. Python's integers cannot overflow."""
    shown = printable(name)
    is_table = isinstance(entry, dict)
    if not is_table or not entry.keys() >= _FIELDS or (rules.is_strict and len(entry) > len(_FIELDS)):
        raise SafetensorsError(ErrorCode.BAD_HEADER, f"{shown} has no entry of dtype, shape and data_offsets", shown)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(ErrorCode.BAD_HEADER, f"{shown} has a shape or data_offsets that are no sizes", shown)
    if not isinstance(dtype, str) or dtype not in rules.dtypes:
        problem = f"{shown} is stored as {printable(str(dtype))}; {rules.dtype_advice}"
        raise SafetensorsError(ErrorCode.DTYPE_UNSUPPORTED, problem, shown)
    if rules.is_strict and 0 in shape:
        problem = f"{shown} has shape {shape}: sharded weights that were not gathered?"
        raise SafetensorsError(ErrorCode.EMPTY_TENSOR, problem, shown)
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if num_bytes != offsets[1] - offsets[0]:
        problem = f"{shown} of shape {shape} takes {num_bytes} bytes, but {offsets[1] - offsets[0]} are set aside"
        raise SafetensorsError(ErrorCode.BAD_LAYOUT, problem, shown)
    return Entry(dtype, tuple(shape), start + offsets[0], num_bytes)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_whole(tensors: dict[str, Entry], start: int, size: int, name: str) -> None:
    """Raise SafetensorsError unless the tensors fill the rest of the file: no gap, no overlap, no bytes behind them."""
    if not tensors:
        raise SafetensorsError(ErrorCode.EMPTY, f"{name} holds no tensor: the adapter was not saved properly", name)
    position = start
    for tensor, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        if entry.offset != position:
            problem = (
                f"{printable(tensor)} starts at byte {entry.offset - start} of the data, "
                f"where {position - start} was due"
            )
            raise SafetensorsError(ErrorCode.BAD_LAYOUT, problem, printable(tensor))
        position += entry.num_bytes
    if position > size:
        problem = f"{name} has {size - start} of {position - start} bytes of data"
        raise SafetensorsError(ErrorCode.TRUNCATED, problem, name)
    if position < size:
        problem = f"{name} has {size - position} bytes that belong to no tensor"
        raise SafetensorsError(ErrorCode.BAD_LAYOUT, problem, name)
