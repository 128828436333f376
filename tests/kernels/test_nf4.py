"""The NF4 format against bitsandbytes' own CPU code, bit for bit, and the decoder against arithmetic in float64."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guanaco.kernels import nf4
from guanaco.kernels.nf4 import Nf4Weight
from support.kernels.nf4_matrices import KINDS, make_matrix

CPU = torch.device("cpu")
# The wrapped function, since torch.compile would build a kernel per shape. Unlike `dequantize_4bit` it is right where
# rows are no multiple of 64 on every machine (the AVX-512 code is not).
bnb_decode = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_as_bitsandbytes(ours: Nf4Weight, x: Tensor) -> None:
    packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=ours.is_double_quantized, quant_type="nf4")
    assert torch.equal(ours.packed, packed.view(-1)), "codes"
    assert torch.equal(ours.absmax, state.absmax), "absmax"
    assert ours.shape == tuple(state.shape)
    assert ours.source_dtype == state.dtype
    if ours.is_double_quantized:
        assert torch.equal(ours.nested_absmax, state.state2.absmax), "nested absmax"
        assert torch.equal(ours.nested_map, state.state2.code), "nested map"
        assert ours.nested_offset == state.offset.item(), "nested offset"


def decoded_in_float64(weight: Nf4Weight) -> Tensor:
    """level × scale, one weight after the other, from the stored fields."""
    n = weight.shape[0] * weight.shape[1]
    values = []
    for i in range(n):
        byte = int(weight.packed[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        scale = weight.absmax[i // 64]
        if weight.is_double_quantized:
            scale = weight.nested_map[int(scale)] * weight.nested_absmax[i // 64 // 256]  # a float32 product
            scale = scale + torch.tensor(weight.nested_offset, dtype=torch.float32)  # and a float32 sum
        values.append(float(torch.tensor(nf4.LEVELS[code], dtype=torch.float32)) * float(scale))
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4.levels(CPU), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_map(CPU), bnb.create_dynamic_map())


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 330),
    dtype=st.sampled_from(nf4.SOURCE_DTYPES),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example("normal", 1, 1, torch.float32, True, 0)  # one weight
@example("normal", 65, 333, torch.float16, True, 1)  # odd size, rows that groups cross, two nested groups
@example("zero rows", 64, 256, torch.bfloat16, True, 2)  # one nested group exactly
@example("constant", 64, 257, torch.float32, True, 3)
def test_quantise_is_bit_identical(
    kind: str, out_features: int, in_features: int, dtype: torch.dtype, double_quant: bool, seed: int
) -> None:
    x = make_matrix(kind, out_features, in_features, dtype, seed)
    ours = nf4.quantize(x, double_quant=double_quant)
    with torch_threads(1):
        assert_same_as_bitsandbytes(ours, x)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(2311, 1153), (40000, 64)], ids=str)
def test_large_matrices_whatever_the_caller_threads(shape: tuple[int, int], seed: int) -> None:
    """Several passes, a short last group, and a mean long enough for torch to share it out among threads."""
    x = make_matrix("normal", *shape, torch.float32, seed)
    with torch_threads(3):
        ours = nf4.quantize(x)
        assert torch.get_num_threads() == 3
    with torch_threads(1):
        assert_same_as_bitsandbytes(ours, x)


def test_the_mean_depends_on_threads() -> None:
    """Why the mean is taken on one thread. If this fails, torch has changed and the care is needless."""
    for seed in range(20):
        x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(seed))
        means = set()
        for threads in (1, 2, 3, 4):
            with torch_threads(threads):
                means.add(x.mean().item())
        if len(means) > 1:
            return
    pytest.fail("20 means, each the same with 1 to 4 threads")


def test_a_weight_is_the_same_on_every_instruction_set() -> None:
    """Fingerprints travel between machines: torch's plainest code path must give what this machine's gives."""
    script = (
        "import torch; from guanaco.kernels import nf4\n"
        "x = torch.arange(300 * 577, dtype=torch.float64).mul_(7919).remainder_(10007).sub_(5000).pow_(3)\n"
        "print(nf4.quantize(x.float().view(300, 577)).fingerprint())"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-P", "-c", script],
            env={**os.environ, **variables},
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for variables in ({}, {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"})
    }
    assert len(prints) == 1


def test_every_value_near_a_threshold() -> None:
    """`encode` replaces a binary search: the same code for ten neighbours on each side of every threshold and cell."""
    table = nf4.levels(CPU)
    thresholds = (table[:-1] + table[1:]) / 2
    edges = torch.cat([thresholds, table, torch.linspace(-1.0, 1.0, 33)])
    values = [edges]
    for direction in (-math.inf, math.inf):
        near = edges
        for _ in range(10):
            near = torch.nextafter(near, torch.tensor(direction))
            values.append(near)
    x = torch.cat([*values, torch.linspace(-1.0, 1.0, 100_001)]).clamp(-1.0, 1.0)
    assert torch.equal(nf4.encode(x), torch.bucketize(x, thresholds).to(torch.uint8))


def test_scales_as_small_and_as_equal_as_can_be() -> None:
    cases = [torch.zeros(300), torch.full((256,), 1e-40), torch.tensor([0.0, 1e-42, -1e-44]), torch.tensor([3.0])]
    cases.append(torch.cat([torch.zeros(256), torch.randn(5)]))
    for scales in cases:
        codes, absmax = nf4.quantize_scales(scales)
        expected, state = bnb.quantize_blockwise(scales, blocksize=256)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, state.absmax)


def test_every_scale_near_a_step_of_the_table() -> None:
    """The table's index is rounded in a way of its own: values around each place where the code changes."""
    steps = nf4._scale_table(CPU).int().diff().nonzero().view(-1) + 1
    near = ((steps.double() - 0.5) / 65535 * 2 - 1).float()
    values = [near]
    for direction in (-math.inf, math.inf):
        value = near
        for _ in range(12):
            value = torch.nextafter(value, torch.tensor(direction))
            values.append(value)
    scales = torch.cat(values)
    scales = torch.nn.functional.pad(scales, (0, -len(scales) % 255)).view(-1, 255)
    scales = torch.cat([torch.ones(len(scales), 1), scales], dim=1).view(-1)  # each group's absmax is 1
    assert torch.equal(nf4.quantize_scales(scales)[0], bnb.quantize_blockwise(scales, blocksize=256)[0])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 150)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(nf4.SOURCE_DTYPES),
    double_quant=st.booleans(),
)
@example((3, 7), "normal", torch.float32, True)
@example((8, 96), "zero rows", torch.float16, True)
def test_decoding_is_level_times_scale(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, double_quant: bool
) -> None:
    weight = nf4.quantize(make_matrix(kind, *shape, dtype, seed=7), double_quant=double_quant)
    exact = decoded_in_float64(weight)  # a product of two float32 is exact here
    for out in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(weight.dequantize(out), exact.float().to(out))
    scales = weight.scales()
    code = bnb.get_4bit_type("nf4", device="cpu")
    assert torch.equal(bnb_decode(weight.packed, scales, code, 64, shape, dtype), weight.dequantize(dtype))


def test_scales_decode_as_in_bitsandbytes() -> None:
    """The nested step of its `dequantize_4bit`: also where a nearly empty group's scale comes out negative."""
    x = make_matrix("sparse", 700, 96, torch.float32, seed=1)
    weight = nf4.quantize(x)
    with torch_threads(1):
        _, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(weight.scales(), expected)
    assert weight.scales().min() < 0


def test_whole_decoding_as_in_bitsandbytes() -> None:
    """Its ordinary entry point, for rows of whole groups, where every one of its code paths is right."""
    for dtype in nf4.SOURCE_DTYPES:
        x = make_matrix("spread", 33, 192, dtype, seed=2)
        with torch_threads(1):
            packed, state = bnb.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(nf4.quantize(x).dequantize(dtype), bnb.dequantize_4bit(packed, state))


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 150)), data=st.data())
def test_rows_are_rows_of_the_matrix(shape: tuple[int, int], data: Any) -> None:
    weight = nf4.quantize(make_matrix("normal", *shape, torch.float32, seed=11))
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    assert torch.equal(weight.dequantize_rows(start, stop), weight.dequantize()[start:stop])


def test_decoding_in_several_passes(monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    weight = nf4.quantize(make_matrix("normal", 37, 133, torch.float32, seed=4))
    whole = weight.dequantize()
    nested = nf4.quantize(make_matrix("spread", 700, 96, torch.float32, seed=4))  # 1050 groups, 5 nested ones
    all_rows = nested.dequantize()
    for start, stop in ((1, 3), (170, 342), (500, 700)):
        assert torch.equal(nested.dequantize_rows(start, stop), all_rows[start:stop])
    monkeypatch.setattr(nf4, "_CHUNK_GROUPS", 7)
    assert torch.equal(weight.dequantize(), whole)
    assert torch.equal(nested.dequantize(), all_rows)
    assert nf4.quantize(make_matrix("normal", 37, 133, torch.float32, seed=4)).fingerprint() == weight.fingerprint()


def test_strided_and_gradient_carrying_input() -> None:
    x = make_matrix("normal", 50, 130, torch.float32, seed=6)
    expected = nf4.quantize(x).fingerprint()
    assert nf4.quantize(x.t().contiguous().t()).fingerprint() == expected
    assert nf4.quantize(x.clone().requires_grad_()).fingerprint() == expected


def test_packing_puts_the_first_code_high() -> None:
    codes = torch.tensor([1, 2, 3, 15, 9], dtype=torch.uint8)
    assert nf4.pack(codes).tolist() == [0x12, 0x3F, 0x97]
    assert torch.equal(nf4.unpack(nf4.pack(codes), 5), codes)


def swapped_pack(codes: Tensor) -> Tensor:
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)
    return codes[0::2] | (codes[1::2] << 4)


def test_a_wrong_nibble_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the comparisons above must fail with it, in the encoder and in the decoder."""
    x = make_matrix("normal", 5, 100, torch.float32, seed=0)
    right = nf4.quantize(x)
    monkeypatch.setattr(nf4, "pack", swapped_pack)
    with pytest.raises(AssertionError, match="codes"):
        assert_same_as_bitsandbytes(nf4.quantize(x), x)
    pairs = nf4._level_pairs(CPU).view(torch.float32).view(256, 2).flip(1).contiguous()
    monkeypatch.setattr(nf4, "_level_pairs", lambda device: pairs.view(torch.int64).view(-1))
    assert not torch.equal(right.dequantize(torch.float32), decoded_in_float64(right).float())


def test_fingerprint_is_of_the_values() -> None:
    x = make_matrix("normal", 20, 100, torch.float32, seed=8)
    double = nf4.quantize(x)
    single = Nf4Weight(double.packed, double.scales(), double.shape, torch.float16)
    assert double.fingerprint() == single.fingerprint()
    assert len(double.fingerprint()) == 64
    other_code, other_scale = double.packed.clone(), double.scales()
    other_code[3] ^= 1
    other_scale[5] += 1e-3
    others = [
        Nf4Weight(other_code, double.scales(), (20, 100), torch.float16),
        Nf4Weight(double.packed, other_scale, (20, 100), torch.float16),
        Nf4Weight(double.packed, double.scales(), (100, 20), torch.float16),
    ]
    assert len({weight.fingerprint() for weight in (double, *others)}) == 4


def test_num_bytes_is_four_and_an_eighth_bits_a_weight() -> None:
    weight = nf4.quantize(make_matrix("normal", 512, 1024, torch.float32, seed=9))
    assert weight.num_bytes == 512 * 1024 // 2 + 8192 + 32 * 4 + 256 * 4
    assert nf4.quantize(torch.ones(512, 1024), double_quant=False).num_bytes == 512 * 1024 // 2 + 8192 * 4


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(4), "a matrix"),
        (torch.ones(0, 5), "not empty"),
        (torch.ones(2, 64, dtype=torch.float64), "float64"),
        (torch.ones(2, 64, dtype=torch.int8), "int8"),
        (torch.tensor([[1.0, float("nan")]]), "finite"),
        (torch.full((3, 100), float("inf")), "finite"),
        (torch.cat([torch.ones(1, 64), torch.full((1, 64), float("-inf"))]), "finite"),
    ],
)
def test_refusals(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nf4.quantize(x)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not func._schema.name.startswith(("aten::view", "aten::detach")):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return result


def test_temporary_memory_is_bounded() -> None:
    """A matrix of 3 million weights is quantised and decoded in pieces: nothing but input and output is as large."""
    x = torch.ones(3000, 1000, dtype=torch.bfloat16)
    with LargestTensor() as quantising:
        weight = nf4.quantize(x)
    with LargestTensor() as decoding:
        weight.dequantize_rows(0, 100)
    pass_bytes = nf4._CHUNK_GROUPS * 64 * 4
    assert quantising.num_bytes <= max(pass_bytes, weight.packed.nbytes)
    assert decoding.num_bytes <= 100 * 1000 * 4 + 2 * 64 * 4
