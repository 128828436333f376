"""An NF4 weight as the tensors that bitsandbytes keeps in a checkpoint: read, checked field by field, and written.

Works on names and tensors, not on files. Called by the loader and by `models.loading.quantize`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels.nf4 import (
    GROUP_SIZE,
    NESTED_GROUP_SIZE,
    SOURCE_DTYPES,
    Nf4Weight,
    dtype_name,
    levels,
)

# Keys beside `X.weight`, as bitsandbytes' QuantState writes them.
STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
FP4_STATE_SUFFIX = ".quant_state.bitsandbytes__fp4"
PART_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE_SUFFIX, FP4_STATE_SUFFIX)

_MAX_FIELDS_BYTES = 1 << 16  # limit on the JSON object among the parts

_DTYPES = {dtype_name(dtype): dtype for dtype in SOURCE_DTYPES}


def quantized_names(keys: Iterable[str]) -> set[str]:
    """Names of the 4-bit weights among a checkpoint's keys. FP4 ones are included so that `from_state` can refuse
    them."""
    suffixes = (STATE_SUFFIX, FP4_STATE_SUFFIX)
    return {key.removesuffix(suffix) for key in keys for suffix in suffixes if key.endswith(suffix)}


def state_keys(name: str, keys: Iterable[str]) -> list[str]:
    """The keys among `keys` that together hold the 4-bit weight `name`."""
    wanted = {name} | {name + suffix for suffix in PART_SUFFIXES}
    return [key for key in keys if key in wanted]


def to_state(weight: Nf4Weight, name: str) -> dict[str, Tensor]:
    """A checkpoint's tensors for the weight called `name` (`….q_proj.weight`): the keys and bytes of bitsandbytes."""
    fields: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": GROUP_SIZE,
        "dtype": dtype_name(weight.source_dtype),
        "shape": list(weight.shape),
    }
    device = weight.packed.device
    state = {
        name: weight.packed.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        # Copies: safetensors refuses to write one memory under two names.
        f"{name}.quant_map": levels(device).clone(),
    }
    if weight.nested_absmax is not None and weight.nested_map is not None:
        state[f"{name}.nested_absmax"] = weight.nested_absmax
        state[f"{name}.nested_quant_map"] = weight.nested_map.clone()
        fields |= {
            "nested_blocksize": NESTED_GROUP_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset,
        }
    state[name + STATE_SUFFIX] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8, device=device)
    return state


def from_state(state: Mapping[str, Tensor], name: str) -> Nf4Weight:
    """The weight called `name` from a checkpoint's tensors. It shares their memory; other tensors in `state` are
    ignored.

    Raises ValueError if a tensor or field is missing, inconsistent, or not in the NF4 form that this server reads; the
    message names it.
    """
    return _StateReader(state, name).read()


class _StateReader:
    """Reads one weight; every error message starts with the key of the tensor or field in question."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        self.state = state
        self.name = name

    def read(self) -> Nf4Weight:
        if self.name + FP4_STATE_SUFFIX in self.state:
            raise ValueError(f"{self.name}: quant_type is 'fp4'; only 'nf4' is supported")
        fields = self._fields()
        self._expect(fields, "quant_type", "nf4")
        self._expect(fields, "blocksize", GROUP_SIZE)
        shape = self._shape(fields)
        source_dtype = _DTYPES.get(str(fields.get("dtype")))
        if source_dtype is None:
            raise self._refusal("dtype", f"is {fields.get('dtype')!r}; it must be one of {', '.join(_DTYPES)}")
        packed = self._packed(shape)
        quant_map = self._part(".quant_map", (torch.float32,), len(levels(packed.device)))
        if not torch.equal(quant_map, levels(packed.device)):
            raise ValueError(f"{self.name}.quant_map: its levels are not those of NF4")
        num_groups = -(-shape[0] * shape[1] // GROUP_SIZE)
        if not self._is_double_quantized(fields):
            # bitsandbytes writes 16-bit scales after its own CPU kernel has run; they are exact in float32.
            return Nf4Weight(packed, self._part(".absmax", SOURCE_DTYPES, num_groups).float(), shape, source_dtype)
        self._expect(fields, "nested_blocksize", NESTED_GROUP_SIZE)
        self._expect(fields, "nested_dtype", "float32")
        offset = fields.get("nested_offset")
        offset32 = torch.tensor(offset, dtype=torch.float32).item() if isinstance(offset, float) else math.nan
        if not math.isfinite(offset32):
            raise self._refusal("nested_offset", f"is {offset!r}; it must be a finite float32 number")
        return Nf4Weight(
            packed,
            self._part(".absmax", (torch.uint8,), num_groups),
            shape,
            source_dtype,
            self._part(".nested_absmax", (torch.float32,), -(-num_groups // NESTED_GROUP_SIZE)),
            self._part(".nested_quant_map", (torch.float32,), 256),
            offset32,
        )

    def _is_double_quantized(self, fields: Mapping[str, Any]) -> bool:
        """Whether all nested parts are there. Some but not all of them would decode to wrong numbers, so that is an
        error."""
        marks = {
            ".nested_absmax": self.name + ".nested_absmax" in self.state,
            ".nested_quant_map": self.name + ".nested_quant_map" in self.state,
            " nested_offset": "nested_offset" in fields,
        }
        if len(set(marks.values())) > 1:
            missing = ", ".join((self.name + key) for key, present in marks.items() if not present)
            raise ValueError(f"{missing}: missing, while other parts of the double quantisation are there")
        return all(marks.values())

    def _fields(self) -> dict[str, Any]:
        key = self.name + STATE_SUFFIX
        tensor = self._part(STATE_SUFFIX, (torch.uint8,), None)
        if tensor.numel() > _MAX_FIELDS_BYTES:
            raise ValueError(f"{key}: it has {tensor.numel()} bytes, where some hundred are due")
        try:
            fields = json.loads(bytes(tensor.tolist()))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key}: not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{key}: not a JSON object")
        return fields

    def _shape(self, fields: Mapping[str, Any]) -> tuple[int, int]:
        shape = fields.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise self._refusal("shape", f"is {shape!r}; it must be [out_features, in_features]")
        return shape[0], shape[1]

    def _packed(self, shape: tuple[int, int]) -> Tensor:
        if self.name not in self.state:
            raise ValueError(f"{self.name}: missing, while its quantisation state is there")
        # bitsandbytes' option `quant_storage` only labels the same bytes as another dtype.
        packed = self.state[self.name].contiguous().view(-1).view(torch.uint8)
        num_bytes = (shape[0] * shape[1] + 1) // 2
        item = self.state[self.name].element_size()
        if packed.numel() != num_bytes:
            stored = f"{packed.numel()} bytes ({item} a stored element)"
            raise self._refusal("shape", f"{list(shape)} needs {num_bytes} bytes of codes, but the tensor has {stored}")
        return packed

    def _part(self, suffix: str, dtypes: tuple[torch.dtype, ...], numel: int | None) -> Tensor:
        key = self.name + suffix
        tensor = self.state.get(key)
        if tensor is None:
            raise ValueError(f"{key}: missing")
        if tensor.dtype not in dtypes:
            names = " or ".join(dtype_name(dtype) for dtype in dtypes)
            raise ValueError(f"{key}: dtype is {dtype_name(tensor.dtype)}; it must be {names}")
        if numel is not None and tensor.numel() != numel:
            raise ValueError(f"{key}: has {tensor.numel()} elements; the weight's shape needs {numel}")
        return tensor.contiguous().view(-1)

    def _expect(self, fields: Mapping[str, Any], field: str, value: object) -> None:
        if fields.get(field) != value:
            raise self._refusal(field, f"is {fields.get(field)!r}; only {value!r} is supported")

    def _refusal(self, field: str, problem: str) -> ValueError:
        return ValueError(f"{self.name}: {field} {problem}")
