"""What 8-bit codes of keys and values mean, and that the reference writes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache, quantise_heads
from support.kernels.attention_cases import check_codes, poisoned_cache
from support.models.oracles import reference_ops

EIGHT_BITS = pytest.mark.parametrize("dtype", CODE_LIMITS, ids=str)


@EIGHT_BITS
@settings(deadline=None)
@given(
    t=st.integers(1, 5),
    head_dim=st.sampled_from([1, 2, 20, 128]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 300.0, 1e20]),
    seed=st.integers(0, 1000),
)
def test_codes_use_their_range_and_are_the_nearest(
    dtype: torch.dtype, t: int, head_dim: int, size: float, seed: int
) -> None:
    x = torch.randn(t, 3, head_dim, generator=torch.Generator().manual_seed(seed)) * size
    codes, scales = quantise_heads(x, dtype)
    assert (codes.dtype, scales.dtype) == (dtype, torch.float32)
    check_codes(codes, scales, x.double())


@EIGHT_BITS
def test_a_head_of_zeros_and_one_of_nan(dtype: torch.dtype) -> None:
    """What is not a number is not a number again, so that its request ends with an error."""
    x = torch.zeros(1, 2, 8)
    x[0, 1, 3] = float("nan")
    codes, scales = quantise_heads(x, dtype)
    assert not (codes[0, 0].float() * scales[0, 0]).any()
    assert (codes[0, 1].float() * scales[0, 1]).isnan().any()


@EIGHT_BITS
def test_the_reference_writes_them_beside_their_scales(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(3, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    angles, slots = torch.rand(3, 4), torch.tensor([11, -1, 3])
    plain, cache = (poisoned_cache((3, 5, 2, 8), kind) for kind in (torch.float32, dtype))
    untouched = [tensor.clone() for tensor in cache.tensors]
    ops = reference_ops()
    for target in (plain, cache):
        ops.rope_and_cache(q, k, v, angles.cos(), angles.sin(), target, slots)
    assert cache.k_scales is not None
    assert cache.v_scales is not None
    for exact, codes, scales in ((plain.k, cache.k, cache.k_scales), (plain.v, cache.v, cache.v_scales)):
        for block, offset in ((2, 1), (0, 3)):
            check_codes(codes[block, offset][None], scales[block, :, offset][None], exact[block, offset][None].double())
            codes[block, offset], scales[block, :, offset] = untouched[0][0, 0], untouched[2][0, :, 0]
    for tensor, before in zip(cache.tensors, untouched, strict=True):
        assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8))


def test_scales_belong_to_codes_and_to_nothing_else() -> None:
    k, scales = torch.zeros(2, 4, 1, 8), torch.zeros(2, 1, 4)
    LayerCache(k, k)
    with pytest.raises(AssertionError, match="scales"):
        LayerCache(k, k, scales, scales)
    with pytest.raises(AssertionError, match="scales"):
        LayerCache(k.to(torch.int8), k.to(torch.int8))
