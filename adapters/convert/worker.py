"""The restricted process behind `convert`: reads one untrusted file, writes one safetensors file, and can do no more.

Both files are already open when it starts. Before it reads the first byte, it limits itself: no new files, sockets or
processes, and bounded memory and time. Runs as `python -I -m guanaco.adapters.convert.worker LIFELINE`; only
`conversion` starts it. Imports neither torch nor pickle.
"""

import codecs
import json
import math
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from guanaco.adapters.convert.torch_pickle import TorchFile
from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.restricted_process import Budget, follow_parent, read_frame, restrict, write_frame
from guanaco.models.formats.safetensors_header import ITEM_BYTES, HeaderRules, SafetensorsError, read_header
from guanaco.models.formats.shown import printable

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Looser than the server's rules: the server's own reader checks the written file.
_RULES = HeaderRules(
    tuple(NUMPY), "adapters are made of floating-point numbers", max_header_bytes=MAX_HEADER_BYTES, is_strict=False
)
_BASE_MEMORY_BYTES = 1 << 30  # reserved by Python and numpy, with some room
_BYTES_PER_CPU_SECOND = 20e6

# Adapters that save_pretrained did not write have `.default` (or another name) before `.weight`.
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]+))?\.weight")
_PREFIX = "base_model.model."


def budget(input_bytes: int, output_bytes: int) -> Budget:
    """The memory, output size and processor time for converting a file of `input_bytes` to at most `output_bytes`."""
    return Budget(
        memory_bytes=_BASE_MEMORY_BYTES + 3 * input_bytes,
        file_bytes=output_bytes,
        cpu_seconds=20 + int(input_bytes / _BYTES_PER_CPU_SECOND),
    )


class SafetensorsSource:
    """An open safetensors file: dtype and shape by name. Raises AdapterError if it is damaged."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        try:
            header = read_header(self._read, size, "the file", _RULES)
        except SafetensorsError as error:
            raise AdapterError(error.code, str(error), error.field) from None
        self.metadata = header.metadata
        self._entries = header.tensors
        self.tensors = {name: (entry.dtype, entry.shape) for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The elements of one tensor; bfloat16 as uint16."""
        entry = self._entries[name]
        data = self._read(entry.offset, entry.num_bytes)
        if len(data) != entry.num_bytes:
            shown = printable(name)
            raise AdapterError(ErrorCode.TRUNCATED, f"the data of {shown} is not all there", shown)
        return np.frombuffer(data, dtype=NUMPY[entry.dtype]).reshape(entry.shape)

    def _read(self, offset: int, num_bytes: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(num_bytes)


Plan = dict[str, tuple[str, str, str, tuple[int, ...]]]  # new key → (old key, old dtype, new dtype, shape)


def make_plan(tensors: dict[str, tuple[str | None, tuple[int, ...]]], dtype: str, max_bytes: int) -> Plan:
    """The tensors to write, decided before any tensor is read. dtype: safetensors' name of a type, or "keep"."""
    if not tensors:
        problem = "the file holds no tensor: a known fault of early 2023 saved empty adapters; train or save it again"
        raise AdapterError(ErrorCode.EMPTY, problem)
    if len(tensors) > MAX_TENSORS:
        raise AdapterError(
            ErrorCode.TOO_MANY_TENSORS, f"the file has {len(tensors)} tensors; the limit is {MAX_TENSORS}"
        )
    plan: Plan = {}
    adapters: set[str | None] = set()
    for key, (old, shape) in tensors.items():
        shown = printable(key)
        if old is None:
            raise AdapterError(ErrorCode.DTYPE_UNSUPPORTED, f"{shown} does not hold floating-point numbers", shown)
        if 0 in shape:
            problem = f"{shown} has shape {list(shape)}: sharded weights not gathered?"
            raise AdapterError(ErrorCode.EMPTY_TENSOR, problem, shown)
        new_key, adapter = modern_key(key)
        adapters.add(adapter)
        if new_key in plan:
            raise AdapterError(ErrorCode.DUPLICATE_TENSOR, f"{shown} is there in two spellings", shown)
        if len(adapters) > 1:
            problem = f"{shown} is of another adapter than those before; save adapters one by one"
            raise AdapterError(ErrorCode.SEVERAL_ADAPTERS, problem, shown)
        plan[new_key] = (key, old, ("F32" if old == "F64" else old) if dtype == "keep" else dtype, shape)
    total = sum(math.prod(shape) * ITEM_BYTES[new] for _, _, new, shape in plan.values())
    if total > max_bytes:
        raise AdapterError(ErrorCode.FILE_TOO_LARGE, f"the tensors take {total} bytes; the limit is {max_bytes}")
    return dict(sorted(plan.items(), key=lambda item: (-ITEM_BYTES[item[1][2]], item[0])))


def modern_key(key: str) -> tuple[str, str | None]:
    """(the key as PEFT writes it today, the adapter's name that stood in it). Other keys stay as they are."""
    match = _KEY.fullmatch(key)
    if match is None:
        return key, None
    module = match["module"]
    if module.startswith("model.layers."):
        module = _PREFIX + module
    return f"{module}.lora_{match['side']}.weight", match["adapter"]


def cast(array: np.ndarray, old: str, new: str, shown: str) -> np.ndarray:
    """Convert to another dtype, rounding to nearest. Raises AdapterError if a finite number would become infinite."""
    if old == new:
        return array
    wide = (array.astype("<u4") << 16).view("<f4") if old == "BF16" else array
    with np.errstate(over="ignore"):
        if new == "BF16":
            result = _to_bfloat16(wide.astype("<f4"))
            seen = (result.astype("<u4") << 16).view("<f4")
        else:
            result = seen = wide.astype(NUMPY[new])
    if not bool(np.array_equal(np.isfinite(seen), np.isfinite(wide))):
        raise AdapterError(
            ErrorCode.OUT_OF_RANGE, f"{shown} holds numbers that {new} cannot; choose another --dtype", shown
        )
    return result


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 → bfloat16 as uint16: the upper 16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array).view("<u4")
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF).astype("<u4")) >> 16).astype("<u2")
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded).astype("<u2")


def write_safetensors(
    target: BinaryIO, plan: Plan, read: Callable[[str], np.ndarray], metadata: dict[str, str]
) -> Iterator[str]:
    """Write the header, then one tensor after the other; yields each new key after it was written."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for key, (_, _, dtype, shape) in plan.items():
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise AdapterError(
            ErrorCode.HEADER_TOO_LARGE, f"the names take {len(text)} bytes; the limit is {MAX_HEADER_BYTES}"
        )
    target.write(struct.pack("<Q", len(text)) + text)
    for key, (source_key, old, new, _) in plan.items():
        target.write(cast(read(source_key), old, new, printable(source_key)).tobytes())
        yield key


def convert(source: BinaryIO, target: BinaryIO, *, is_pickle: bool, dtype: str, max_bytes: int) -> dict[str, Any]:
    """The whole conversion. Returns plain data about it. Raises AdapterError for a refused file."""
    file: TorchFile | SafetensorsSource
    if is_pickle:
        file = TorchFile(source)
        tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()}
        metadata = {}
    else:
        file = SafetensorsSource(source)
        tensors = dict(file.tensors)
        metadata = file.metadata
    plan = make_plan(tensors, dtype, max_bytes)
    written = list(write_safetensors(target, plan, file.read, {**metadata, "format": "pt"}))
    target.flush()
    dtypes = [new for _, _, new, _ in plan.values()]
    return {
        "num_tensors": len(written),
        "num_renamed": sum(new != old for new, (old, *_) in plan.items()),
        "dtypes": {name: dtypes.count(name) for name in sorted(set(dtypes))},
    }


def main() -> None:
    """Read one request from standard input, write one answer to standard output; both are JSON."""
    follow_parent(int(sys.argv[1]))
    message = read_frame(sys.stdin.buffer)
    if message is None:
        return
    request = json.loads(message)
    with os.fdopen(request["source"], "rb") as source, os.fdopen(request["target"], "wb") as target:
        # Python opens files for messages and codecs on first use; none of that works afterwards.
        for codec in ("unicode_escape", "cp437"):  # for messages; for names in archives that are not marked as UTF-8
            codecs.lookup(codec)
        restrict(budget(os.fstat(source.fileno()).st_size, request["max_bytes"] + MAX_HEADER_BYTES + 8))
        try:
            answer = convert(
                source,
                target,
                is_pickle=request["is_pickle"],
                dtype=request["dtype"],
                max_bytes=request["max_bytes"],
            )
        except AdapterError as error:
            answer = {"code": error.code, "message": str(error), "field": error.field}
        except MemoryError:
            problem = "the file asks for more memory than it can need"
            answer = {"code": ErrorCode.BAD_PICKLE, "message": problem, "field": None}
    write_frame(sys.stdout.buffer, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
