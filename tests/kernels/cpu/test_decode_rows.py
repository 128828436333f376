"""Rows of weights as numbers, which training multiplies: every provider of the processor, every kind of weight."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guanaco.kernels import load_ops, nf4
from guanaco.kernels.cpu.ops import _torch_team
from guanaco.kernels.nf4 import LEVELS, Nf4Weight, unpack
from support.kernels.providers import CPU, FAST, provider_ops

NATIVE = [name for name in FAST if name.startswith("cpu")]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiled(weight: Nf4Weight) -> Tensor:
    """What a tile holds, by the definition of its format: level × (scale in 16 bits × the row's factor), float32."""
    n, k = weight.shape
    scales = weight.scales().view(n, k // nf4.GROUP_SIZE)
    largest = scales.abs().amax(dim=1, keepdim=True)
    # Not 32767 / largest, which torch computes by a reciprocal.
    to_integer = torch.where(largest < 1e-30, torch.zeros(()), torch.full_like(largest, 32767).div(largest))
    served = torch.round(scales * to_integer) * (largest / 32767)
    levels = torch.tensor(LEVELS)[unpack(weight.packed, n * k).long()].view(n, k)
    return levels * served.repeat_interleave(nf4.GROUP_SIZE, dim=1)


def decode(ops: Any, weight: Any, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows, in memory that is poisoned before, and untouched beyond them afterwards."""
    rows, k = stop - start, weight.shape[1]
    memory = torch.full((rows * k + 64,), torch.nan, dtype=dtype)
    ops.decode_rows(ops.prepare(weight, None), start, stop, memory[: rows * k].view(rows, k))
    assert memory[rows * k :].isnan().all()
    return memory[: rows * k].view(rows, k)


@given(
    n=st.integers(1, 70), groups=st.integers(1, 5), seed=st.integers(0, 10**6),
    ends=st.tuples(st.integers(0, 70), st.integers(0, 70)),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_tiles_are_decoded_exactly_on_every_instruction_set(
    n: int, groups: int, seed: int, ends: tuple[int, int]
) -> None:
    matrix = randn(n, groups * nf4.GROUP_SIZE, seed=seed)
    matrix[0, :64] = 0
    weight = nf4.quantize(matrix)
    expected = tiled(weight)
    start, stop = sorted(min(end, n) for end in ends)
    for name in NATIVE:
        ops = provider_ops(name)
        assert torch.equal(decode(ops, weight, 0, n), expected)
        assert torch.equal(decode(ops, weight, start, stop), expected[start:stop])
        assert torch.equal(decode(ops, weight, start, stop, torch.bfloat16), expected[start:stop].bfloat16())


def test_a_tile_s_scales_are_nearly_those_of_the_checkpoint() -> None:
    """Half a unit of 16 bits of a row's largest scale at most; 1.5e-5 of the length of all."""
    weight = nf4.quantize(randn(300, 2048))
    exact = weight.dequantize()
    largest = weight.scales().view(300, -1).abs().amax(dim=1, keepdim=True)
    for name in NATIVE:
        difference = decode(provider_ops(name), weight, 0, 300).double() - exact.double()
        assert ((difference.abs() / largest).max()) <= 0.51 / 32767
        assert difference.norm() / exact.double().norm() < 1.5e-5


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 80), (33, 176), (16, 100)])
def test_groups_across_rows_are_decoded_as_they_are_stored(name: str, n: int, k: int) -> None:
    weight = nf4.quantize(randn(n, k))
    for start, stop in ((0, n), (n // 2, n), (0, n // 2)):
        assert torch.equal(decode(provider_ops(name), weight, start, stop), weight.dequantize()[start:stop])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_weights_come_out_as_they_are(name: str, stored: torch.dtype) -> None:
    weight = randn(37, 50).to(stored)
    assert torch.equal(decode(provider_ops(name), weight, 3, 30), weight[3:30].float())
    assert torch.equal(decode(provider_ops(name), weight, 0, 37, torch.bfloat16), weight.bfloat16())


def test_the_threads_change_nothing() -> None:
    weight = nf4.quantize(randn(500, 192))
    results = [decode(provider_ops("cpu", threads=threads), weight, 5, 490) for threads in (1, 2, 5)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_threads_of_torch_do_the_same_work(threads: int) -> None:
    weight = nf4.quantize(randn(500, 192))
    ops: Any = load_ops("cpu", device=CPU, dtype=torch.float32, threads=threads, in_torch_threads=True)
    expected = decode(provider_ops("cpu"), weight, 0, 500)
    for _ in range(20):
        assert torch.equal(decode(ops, weight, 0, 500), expected)
        assert (torch.ones(300, 300) @ torch.ones(300, 300) == 300).all()


def test_torch_has_threads_to_share() -> None:
    """The wheels for Linux have GCC's OpenMP. Where another one comes, sharing stops quietly; then this says so."""
    assert _torch_team() is not None
