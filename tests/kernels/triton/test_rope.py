"""Rotary embedding and the KV write, in Triton's interpreter, against float64; the cache in 16, 32 and 8 bits."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.kernels.attention_cases import check_codes, poisoned_cache
from support.kernels.tolerances import RELATIVE_L2, relative_l2

pytest.importorskip("triton")

from guanaco.kernels.triton.rope import rope_and_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float16: one rounding to 11 bits is off by 2^-11 = 4.9e-4 of a value at most.
TOLERANCE = {**RELATIVE_L2, torch.float16: 5e-4}
poisoned = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    for row in range(len(expected)):
        assert relative_l2(actual[row], expected[row]) <= TOLERANCE[dtype]


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """float64: each pair (i, i + head_dim / 2) as a complex number, times e^(i·angle)."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half].double(), x[..., half:].double())
    number = number * torch.complex(angles.cos().double(), angles.sin().double()).unsqueeze(1)
    return torch.cat([number.real, number.imag], dim=-1)


class Rope:
    """Queries, keys and values, cut from one merged tensor, and an empty cache."""

    def __init__(
        self, t: int, heads: int, kv_heads: int, head_dim: int, block_size: int,
        dtype: torch.dtype, stored: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        merged = randn(t, heads + 2 * kv_heads, head_dim, seed=seed, dtype=dtype)
        self.q, self.k, self.v = merged.split([heads, kv_heads, kv_heads], dim=1)
        self.k[:, :1] *= 30
        self.v[:, -1:] *= 0.01
        self.angles = torch.rand(t, head_dim // 2, generator=generator) * 6
        self.slots = torch.randperm(12 * block_size, generator=generator)[:t]
        self.slots[torch.rand(t, generator=generator) < 0.3] = -1
        self.cache = poisoned_cache((12, block_size, kv_heads, head_dim), stored)
        self.untouched = self.cache.k.clone()

    def run(self) -> Tensor:
        angles = self.angles.cos(), self.angles.sin()
        return rope_and_cache(self.q, self.k, self.v, *angles, self.cache, self.slots)


ROPES = {
    "t": st.integers(0, 9),
    "heads": st.sampled_from([(1, 1), (9, 3), (4, 4), (8, 1), (13, 13)]),
    "head_dim": st.sampled_from([2, 16, 64, 80, 128]),
    "block_size": st.sampled_from([1, 8, 16]),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


@poisoned
@given(**ROPES)
def test_rope_and_cache(
    nan_poison: None, t: int, heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    rope = Rope(t, *heads, head_dim, block_size, dtype, dtype, seed)
    inputs = [x.clone() for x in (rope.q, rope.k, rope.v)]
    rotated = rope.run()
    assert all(torch.equal(a, b) for a, b in zip(inputs, (rope.q, rope.k, rope.v), strict=True)), "inputs were changed"
    check(rotated, turned(rope.q, rope.angles), dtype)
    written = rope.slots >= 0
    flat_k, flat_v = (cache.flatten(0, 1) for cache in rope.cache.tensors)
    check(flat_k[rope.slots[written]], turned(rope.k, rope.angles)[written], dtype)
    assert torch.equal(flat_v[rope.slots[written]], rope.v[written])
    others = torch.ones(12 * block_size, dtype=torch.bool)
    others[rope.slots[written]] = False
    assert flat_k[others].isnan().all()
    assert flat_v[others].isnan().all()


@poisoned
@given(stored=st.sampled_from([torch.int8, torch.float8_e4m3fn]), **ROPES)
def test_a_quantised_cache(
    nan_poison: None, stored: torch.dtype, t: int, heads: tuple[int, int], head_dim: int, block_size: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Codes as they are specified, where the slots say, and nothing else touched."""
    rope = Rope(t, *heads, head_dim, block_size, dtype, stored, seed)
    check(rope.run(), turned(rope.q, rope.angles), dtype)
    written = rope.slots >= 0
    slots = rope.slots[written]
    others = torch.ones(12 * block_size, dtype=torch.bool)
    others[slots] = False
    for cache, scales, exact in zip(
        (rope.cache.k, rope.cache.v), (rope.cache.k_scales, rope.cache.v_scales),
        (turned(rope.k, rope.angles), rope.v.double()), strict=True,
    ):  # fmt: skip
        assert scales is not None
        codes, scale = cache.flatten(0, 1)[slots], scales.transpose(1, 2).flatten(0, 1)[slots]
        check_codes(codes, scale, exact[written])
        assert torch.equal(
            cache.flatten(0, 1)[others].view(torch.uint8), rope.untouched.flatten(0, 1)[others].view(torch.uint8)
        )
        assert scales.transpose(1, 2).flatten(0, 1)[others].isnan().all()


def test_a_wrong_slot_and_a_wrong_angle_are_found(nan_poison: None) -> None:
    """The planted bugs: the comparisons above must fail with them."""
    rope = Rope(5, 4, 2, 16, 8, torch.float32, torch.float32, 3)
    rope.slots = torch.arange(5) * 3
    rotated = rope.run()
    check(rotated, turned(rope.q, rope.angles), torch.float32)
    with pytest.raises(AssertionError):
        check(rotated, turned(rope.q, -rope.angles), torch.float32)
    keys = rope.cache.k.flatten(0, 1)
    check(keys[rope.slots], turned(rope.k, rope.angles), torch.float32)
    with pytest.raises(AssertionError):
        check(keys[rope.slots.flip(0)], turned(rope.k, rope.angles), torch.float32)
