"""NF4 weights in a checkpoint: the same keys and bytes as bitsandbytes, read back the same, and refused by field."""

import json
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from guanaco.kernels import nf4
from guanaco.kernels.nf4_state import (
    FP4_STATE_SUFFIX,
    STATE_SUFFIX,
    from_state,
    quantized_names,
    state_keys,
    to_state,
)

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(1, 1), (5, 100), (64, 64), (65, 333), (300, 96)]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def bnb_state(x: Tensor, *, double: bool, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """What bitsandbytes writes for a module's weight."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    packed, state = bnb.quantize_4bit(
        x, blocksize=64, compress_statistics=double, quant_type="nf4", quant_storage=storage
    )
    torch.set_num_threads(threads)
    return {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


def edited(state: dict[str, Tensor], **fields: Any) -> dict[str, Tensor]:
    """The state with other values in its packed JSON; `...` removes a field."""
    key = NAME + STATE_SUFFIX
    known = json.loads(bytes(state[key].tolist())) | fields
    text = json.dumps({k: v for k, v in known.items() if v is not ...})
    return state | {key: torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", nf4.SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_written_as_bitsandbytes_writes(shape: tuple[int, int], dtype: torch.dtype, double: bool) -> None:
    x = matrix(shape, dtype)
    ours, theirs = to_state(nf4.quantize(x, double_quant=double), NAME), bnb_state(x, double=double)
    assert list(ours) == list(theirs) or set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_read_back_and_by_bitsandbytes(shape: tuple[int, int], double: bool) -> None:
    weight = nf4.quantize(matrix(shape, torch.float16), double_quant=double)
    state = to_state(weight, NAME)
    again = from_state(state, NAME)
    assert again.fingerprint() == weight.fingerprint()
    assert (again.shape, again.source_dtype) == (weight.shape, weight.source_dtype)
    assert again.is_double_quantized == double
    assert again.packed.data_ptr() == weight.packed.data_ptr(), "shared, not copied"
    parts = {key.removeprefix(NAME + "."): value for key, value in state.items() if key != NAME}
    read_by_bnb = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    assert tuple(read_by_bnb.shape) == weight.shape
    if double:
        assert read_by_bnb.offset.item() == weight.nested_offset


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_storage_dtypes_are_the_same_bytes(storage: torch.dtype) -> None:
    x = matrix((24, 96))
    state = bnb_state(x, double=True, storage=storage)
    assert state[NAME].dtype == storage
    assert from_state(state, NAME).fingerprint() == nf4.quantize(x).fingerprint()


def test_16_bit_scales_of_an_old_save_are_taken_as_stored() -> None:
    state = bnb_state(matrix((8, 128)), double=False)
    state[f"{NAME}.absmax"] = state[f"{NAME}.absmax"].bfloat16()
    assert torch.equal(from_state(state, NAME).scales(), state[f"{NAME}.absmax"].float())


def test_names_and_keys() -> None:
    state = to_state(nf4.quantize(matrix((4, 64))), NAME)
    other = {"model.norm.weight": torch.ones(4), NAME.replace("up", "down") + FP4_STATE_SUFFIX: torch.ones(1)}
    assert quantized_names([*state, *other]) == {NAME, NAME.replace("up", "down")}
    assert sorted(state_keys(NAME, [*state, *other])) == sorted(state)
    assert from_state(state | other, NAME).shape == (4, 64)


def changed_map(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {f"{NAME}.quant_map": state[f"{NAME}.quant_map"].roll(1)}


def without(*suffixes: str) -> Any:
    return lambda state: {k: v for k, v in state.items() if k not in {NAME + suffix for suffix in suffixes}}


REFUSALS: dict[str, tuple[Any, str]] = {
    "fp4": (lambda s: s | {NAME + FP4_STATE_SUFFIX: s[NAME + STATE_SUFFIX]}, "quant_type is 'fp4'"),
    "type": (lambda s: edited(s, quant_type="fp4"), "quant_type is 'fp4'"),
    "blocksize": (lambda s: edited(s, blocksize=128), "blocksize is 128"),
    "no blocksize": (lambda s: edited(s, blocksize=...), "blocksize is None"),
    "nested blocksize": (lambda s: edited(s, nested_blocksize=64), "nested_blocksize is 64"),
    "nested dtype": (lambda s: edited(s, nested_dtype="float16"), "nested_dtype is 'float16'"),
    "nested offset": (lambda s: edited(s, nested_offset=float("nan")), "nested_offset is nan"),
    "nested offset text": (lambda s: edited(s, nested_offset="0.1"), "nested_offset is '0.1'"),
    "nested offset too large": (lambda s: edited(s, nested_offset=3e39), r"nested_offset is 3e\+39"),
    "half nested": (lambda s: edited(s, nested_offset=...), "nested_offset: missing"),
    "no nested map": (without(".nested_quant_map"), r"nested_quant_map: missing"),
    "map": (changed_map, "quant_map: its levels"),
    "dtype": (lambda s: edited(s, dtype="float64"), "dtype is 'float64'"),
    "dtype list": (lambda s: edited(s, dtype=["float16"]), "dtype is"),
    "shape": (lambda s: edited(s, shape=[5, 101]), r"shape \[5, 101\] needs 253 bytes"),
    "transposed shape is caught by the caller, a flat one here": (lambda s: edited(s, shape=[500]), "shape is"),
    "bool shape": (lambda s: edited(s, shape=[True, 500]), "shape is"),
    "negative": (lambda s: edited(s, shape=[-5, -100]), "shape is"),
    "no codes": (without(""), r"up_proj\.weight: missing"),
    "no scales": (without(".absmax"), r"\.absmax: missing"),
    "no state": (without(STATE_SUFFIX), "bitsandbytes__nf4: missing"),
    "short scales": (lambda s: s | {f"{NAME}.absmax": s[f"{NAME}.absmax"][:-1]}, r"absmax: has 7 elements"),
    "float scales": (lambda s: s | {f"{NAME}.absmax": torch.ones(8)}, r"absmax: dtype is float32"),
    "nested absmax": (lambda s: s | {f"{NAME}.nested_absmax": torch.ones(2)}, r"nested_absmax: has 2 elements"),
    "state dtype": (lambda s: s | {NAME + STATE_SUFFIX: torch.ones(3)}, "dtype is float32; it must be uint8"),
    "no json": (lambda s: s | {NAME + STATE_SUFFIX: torch.ones(3, dtype=torch.uint8)}, "not JSON"),
    "json list": (
        lambda s: s | {NAME + STATE_SUFFIX: torch.tensor(list(b"[1]"), dtype=torch.uint8)},
        "not a JSON object",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_field(case: str) -> None:
    change, message = REFUSALS[case]
    state = to_state(nf4.quantize(matrix((5, 100))), NAME)
    from_state(state, NAME)
    with pytest.raises(ValueError, match=message):
        from_state(change(state), NAME)
