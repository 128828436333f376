"""Reads files of torch.save without running anything: it interprets the opcodes itself, and only tensors can come out.

Does not use the pickle module: no name in a file is ever imported or called. Knows nothing of LoRA. Only `worker` calls
it, which runs in a restricted process; the server never opens such a file.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.shown import printable

MAX_PICKLE_BYTES = 16 << 20  # limit on the structure, without tensors; LLaMA-65B's adapter has 120 kB
MAX_DIMENSIONS = 8
# torch/serialization.py: the first two pickles of files by torch before 1.6 (and by later releases, on request).
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_LEGACY_STORAGES = 8192

# Storage class in the file → (safetensors' name of the element type, numpy's); bfloat16 is read as its 16 bits.
FLOATS = {
    "FloatStorage": ("F32", "<f4"),
    "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"),
    "DoubleStorage": ("F64", "<f8"),
}
_OTHERS = {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}


@dataclass(frozen=True)
class _Global:
    """A name that the pickle wants to import; it stays a name and is never imported."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    num_elements: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it, not yet checked against the file's data."""

    storage: _Storage
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str | None:
        """The dtype by safetensors' name; None for types that no adapter uses."""
        return FLOATS.get(self.storage.kind, (None,))[0]


def _bad(problem: str) -> AdapterError:
    return AdapterError(ErrorCode.BAD_PICKLE, f"the file is damaged or was not written by torch.save: {problem}")


class TorchFile:
    """An open file of torch.save with its structure read: `tensors` by name.

    Raises AdapterError for anything that is not a flat table of tensors: `unsafe_pickle` (with the name that the file
    wants to call), `bad_pickle`, `not_tensors`, `byte_order_unsupported`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._archive: zipfile.ZipFile | None = None
        self._prefix = ""
        self._legacy_starts: dict[str, int] = {}
        self._last: tuple[str, bytes] = ("", b"")
        try:
            content = self._read_zip() if file.read(4) == b"PK\x03\x04" else self._read_legacy()
        except _BROKEN as error:
            raise _bad(type(error).__name__) from None
        self.tensors = _flat(content)

    def read(self, name: str) -> np.ndarray:
        """The elements of one tensor in its own shape; bfloat16 as uint16. Raises AdapterError if the tensor is empty,
        is not of floating-point numbers, or its data is missing."""
        tensor = self.tensors[name]
        shown = printable(name)
        if tensor.storage.kind not in FLOATS:
            problem = f"{shown} is a {tensor.storage.kind}; adapters are made of floating-point numbers"
            raise AdapterError(ErrorCode.DTYPE_UNSUPPORTED, problem, shown)
        dtype = np.dtype(FLOATS[tensor.storage.kind][1])
        _check_extent(tensor, shown)
        try:
            data = self._storage(tensor.storage, dtype.itemsize)
        except _BROKEN as error:
            raise AdapterError(ErrorCode.BAD_PICKLE, f"the data of {shown} cannot be read: {error}", shown) from None
        flat = np.frombuffer(data, dtype=dtype)[tensor.offset :]
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False))

    def _read_zip(self) -> object:
        self._archive = zipfile.ZipFile(self._file)
        entries = [name for name in self._archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(entries) != 1:
            raise _bad("it has no single data.pkl")
        self._prefix = entries[0].removesuffix("data.pkl")
        order = self._prefix + "byteorder"
        if order in self._archive.namelist() and self._member(order, 16) != b"little":
            raise AdapterError(
                ErrorCode.BYTE_ORDER_UNSUPPORTED, "the file is big-endian; convert it where it was written"
            )
        return _Machine().run(io.BytesIO(self._member(entries[0], MAX_PICKLE_BYTES)))

    def _member(self, name: str, max_bytes: int) -> bytes:
        """One file of the archive, with its checksum verified. torch.save doesn't compress, so no member can expand."""
        assert self._archive is not None
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise _bad("it is a compressed archive")
        if info.file_size > max_bytes:
            raise _bad(f"{printable(name)} has {info.file_size} bytes where at most {max_bytes} are due")
        return self._archive.read(info)

    def _read_legacy(self) -> object:
        """Read the older format: three pickles of header, the content, the storages' keys; then each storage with its
        length."""
        self._file.seek(0)
        bounded = _Bounded(self._file, MAX_PICKLE_BYTES)
        if _Machine().run(bounded) != _LEGACY_MAGIC:
            raise _bad("it does not start as such files do")
        if _Machine().run(bounded) != _LEGACY_PROTOCOL:
            raise _bad("it has an unknown version")
        system = _Machine().run(bounded)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise AdapterError(
                ErrorCode.BYTE_ORDER_UNSUPPORTED, "the file is big-endian; convert it where it was written"
            )
        content, keys = _Machine().run(bounded), _Machine().run(bounded)
        if not isinstance(keys, list) or len(keys) > _MAX_LEGACY_STORAGES:
            raise _bad("its storages are not listed")
        sizes = {t.storage.key: _item_bytes(t.storage.kind) for t in _tensors_in(content)}
        for key in keys:
            if not isinstance(key, str) or key not in sizes:
                raise _bad("it lists a storage that no tensor uses")
            (count,) = struct.unpack("<q", self._file.read(8))
            self._legacy_starts[key] = self._file.tell()
            if count < 0 or any(t.storage.num_elements != count for t in _tensors_in(content) if t.storage.key == key):
                raise _bad("a storage has another length than its tensors say")
            self._file.seek(count * sizes[key], io.SEEK_CUR)
        return content

    def _storage(self, storage: _Storage, item_bytes: int) -> bytes:
        if self._last[0] == storage.key:  # tensors that share a storage are neighbours
            return self._last[1]
        num_bytes = storage.num_elements * item_bytes
        if self._archive is not None:
            data = self._member(f"{self._prefix}data/{storage.key}", num_bytes)
        elif storage.key in self._legacy_starts:
            self._file.seek(self._legacy_starts[storage.key])
            data = self._file.read(num_bytes)
        else:
            data = b""
        if len(data) != num_bytes:
            raise _bad(f"storage {printable(storage.key)} has {len(data)} of {num_bytes} bytes")
        self._last = (storage.key, data)
        return data


_BROKEN = (zipfile.BadZipFile, ValueError, OverflowError, EOFError, OSError, KeyError, RuntimeError, struct.error)


def _item_bytes(kind: str) -> int:
    return np.dtype(FLOATS[kind][1]).itemsize if kind in FLOATS else _OTHERS[kind]


def _tensors_in(content: object) -> list[PickledTensor]:
    return [v for v in content.values() if isinstance(v, PickledTensor)] if isinstance(content, dict) else []


def _flat(content: object) -> dict[str, PickledTensor]:
    if not isinstance(content, dict):
        raise AdapterError(ErrorCode.NOT_TENSORS, "the file holds no table of tensors; is it an adapter's weights?")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, PickledTensor):
            shown = printable(str(key))
            problem = f"{shown} is no tensor; a training checkpoint? The adapter's own file is adapter_model.bin"
            raise AdapterError(ErrorCode.NOT_TENSORS, problem, shown)
    return content


def _check_extent(tensor: PickledTensor, shown: str) -> None:
    """Check that the tensor lies inside its storage and has no more elements: it is no larger than the data."""
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    count = math.prod(tensor.shape)
    if 0 in tensor.shape:
        raise AdapterError(
            ErrorCode.EMPTY_TENSOR, f"{shown} has shape {list(tensor.shape)}: sharded weights not gathered?", shown
        )
    if last >= tensor.storage.num_elements or count > tensor.storage.num_elements:
        raise AdapterError(ErrorCode.BAD_PICKLE, f"{shown} reaches beyond its data", shown)


class _Bounded:
    """A file of which a reader may read only a limited number of bytes."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._left = file, limit

    def read(self, count: int) -> bytes:
        return self._take(self._file.read(min(count, self._left + 1)))

    def readline(self) -> bytes:
        return self._take(self._file.readline(self._left + 1))

    def _take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise _bad(f"its structure is larger than {MAX_PICKLE_BYTES} bytes")
        return data


# Opcodes that push their own argument on the stack.
_CONSTANTS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    }
)
_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


class _Machine:
    """pickle's stack machine. Names stay names, and the three known functions only record their arguments."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: Any) -> object:
        """The object of one pickle, read up to its end. Raises AdapterError for opcodes that tensors do not need."""
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self._pop()
            if name in _CONSTANTS:
                self._stack.append(argument)
            elif name in _FIXED:
                self._stack.append(_FIXED[name]())
            elif name not in ("PROTO", "FRAME"):
                self._step(name, argument)
        raise _bad("it ends too early")

    def _step(self, name: str, argument: Any) -> None:
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self._stack.append(tuple(self._above_mark() if name == "TUPLE" else self._take(int(name[-1]))))
        elif name in ("LIST", "DICT"):
            items = self._above_mark()
            self._stack.append(items if name == "LIST" else {})
            if name == "DICT":
                self._set(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise _bad("it refers to nothing")
            self._stack.append(self._memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._take(2) if name == "SETITEM" else self._above_mark())
        elif name in ("APPEND", "APPENDS"):
            self._append(self._take(1) if name == "APPEND" else self._above_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self._take(2)
            self._stack.append(_known(module, attribute))
        elif name == "REDUCE":
            function, arguments = self._take(2)
            self._stack.append(_note_call(function, arguments))
        elif name == "BINPERSID":
            self._stack.append(_storage_of(self._pop()))
        elif name == "BUILD":
            target, _ = self._take(2)  # attributes of an OrderedDict, such as a state dict's `_metadata`; not needed
            if type(target) is not dict:
                raise _bad("it sets attributes of something else")
            self._stack.append(target)
        else:
            raise AdapterError(
                ErrorCode.UNSAFE_PICKLE,
                f"the file uses the pickle opcode {name}, which no tensor needs: reading stopped there",
            )

    def _pop(self) -> Any:
        return self._take(1)[0]

    def _top(self) -> Any:
        if not self._stack:
            raise _bad("it takes from an empty stack")
        return self._stack[-1]

    def _take(self, count: int) -> list[Any]:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - count < floor:
            raise _bad("it takes from an empty stack")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _above_mark(self) -> list[Any]:
        if not self._marks:
            raise _bad("it has no mark")
        start = self._marks.pop()
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _set(self, items: list[Any]) -> None:
        table = self._top()
        if type(table) is not dict or len(items) % 2:
            raise _bad("it sets items of something else")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise _bad("it has a key that is no text")
            table[key] = value

    def _append(self, items: list[Any]) -> None:
        if type(self._top()) is not list:
            raise _bad("it appends to something else")
        self._top().extend(items)


_REBUILD, _PARAMETER = _Global("torch._utils", "_rebuild_tensor_v2"), _Global("torch._utils", "_rebuild_parameter")
_ORDERED = _Global("collections", "OrderedDict")


def _known(module: object, name: object) -> _Global:
    """The few names that tensors need. Every other name is refused before it can have an effect."""
    found = _Global(str(module), str(name))
    if found in (_REBUILD, _PARAMETER, _ORDERED):
        return found
    if found.module == "torch" and (found.name in FLOATS or found.name in _OTHERS):
        return found
    shown = printable(f"{found.module}.{found.name}")
    raise AdapterError(
        ErrorCode.UNSAFE_PICKLE, f"loading the file with torch would call {shown}: reading stopped there", shown
    )


def _note_call(function: object, arguments: object) -> object:
    if isinstance(arguments, tuple):
        if function == _ORDERED and arguments in ((), ([],)):
            return {}
        if function == _PARAMETER and arguments and isinstance(arguments[0], PickledTensor):
            return arguments[0]
        if function == _REBUILD and len(arguments) in (6, 7):
            return _tensor_of(*arguments[:4])
    raise _bad("it calls a function in a way that torch does not")


def _tensor_of(storage: object, offset: object, shape: object, strides: object) -> PickledTensor:
    sizes = (shape, strides)
    if not isinstance(storage, _Storage) or not _is_size(offset) or not all(isinstance(s, tuple) for s in sizes):
        raise _bad("a tensor has no storage, offset or shape")
    assert isinstance(offset, int)
    assert isinstance(shape, tuple)
    assert isinstance(strides, tuple)
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape + strides):
        raise _bad("a tensor has a shape or strides that are no sizes")
    return PickledTensor(storage, offset, shape, strides)


def _storage_of(reference: object) -> _Storage:
    """`("storage", class, key, device, elements)`, with a sixth None in the older format."""
    if isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] == "storage":
        _, kind, key, _, count = reference[:5]
        view = reference[5] if len(reference) == 6 else None
        is_kind = isinstance(kind, _Global) and kind.module == "torch"
        if is_kind and isinstance(key, str) and key.isalnum() and _is_size(count) and view is None:
            return _Storage(kind.name, key, count)
    raise _bad("a tensor refers to no storage")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48
