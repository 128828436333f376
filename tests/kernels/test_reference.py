"""What only the reference provider has: decoded weights within a budget, tiles, caches that are views."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from guanaco.kernels import load_ops, nf4, reference
from guanaco.kernels.layer_cache import LayerCache
from support.kernels.tolerances import assert_close

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
MODULE = 3
poisoned = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_ops(dtype: torch.dtype = torch.float32, budget: int = 0) -> Any:
    return load_ops("reference", device=CPU, dtype=dtype, decoded_weights_bytes=budget)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_nibble_order_is_found(dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nf4.quantize(randn(32, 64))
    x = randn(4, 64, seed=5, dtype=dtype)
    expected = x.double() @ weight.dequantize().double().T
    pairs = nf4._level_pairs(CPU).view(torch.float32).view(256, 2).flip(1).contiguous()
    monkeypatch.setattr(nf4, "_level_pairs", lambda device: pairs.view(torch.int64).view(-1))
    ops = make_ops(dtype, budget=(1 << 30) * kept)
    with pytest.raises(AssertionError, match="relative l2 error"):
        assert_close(ops.linear(x, ops.prepare(weight, None), None, 0), expected, dtype)


def test_decoded_weights_keep_to_the_budget() -> None:
    ops = make_ops(budget=3 * 50 * 70 * 4 + 8)
    weights = [nf4.quantize(randn(50, 70, seed=i)) for i in range(5)]
    handles = [ops.prepare(weight, None) for weight in weights]
    assert [handle.num_bytes for handle in handles] == [50 * 70 * 4] * 3 + [weights[0].num_bytes] * 2
    assert ops.decoded_bytes_used == 3 * 50 * 70 * 4
    # A smaller one still fits, and what is float32 already costs nothing.
    small, dense = nf4.quantize(torch.ones(1, 2)), randn(9, 9)
    assert ops.prepare(small, torch.ones(1)).num_bytes == 8 + 4
    assert ops.prepare(dense, None).num_bytes == 9 * 9 * 4
    assert ops.decoded_bytes_used == ops.decoded_weights_bytes
    x = randn(3, 70, seed=9)
    for weight, handle in zip(weights, handles, strict=True):
        assert_close(ops.linear(x, handle, None, 0), x.double() @ weight.dequantize().double().T, torch.float32)


def test_a_dense_head_keeps_its_stored_bytes_or_an_exact_copy() -> None:
    table = randn(101, 64, dtype=torch.bfloat16)
    small, large = make_ops(), make_ops(budget=1 << 30)
    stored, copied = small.prepare(table, None), large.prepare(table, None)
    assert (stored.num_bytes, copied.num_bytes) == (101 * 64 * 2, 101 * 64 * 4)
    assert stored.weight.data_ptr() == table.data_ptr(), "a tied table is not copied"
    x = randn(7, 64, seed=1, dtype=torch.bfloat16)
    expected = x.double() @ table.double().T
    for ops, handle in ((small, stored), (large, copied)):
        for activations in DTYPES:
            logits = load_ops("reference", device=CPU, dtype=activations, decoded_weights_bytes=0).lm_head(x, handle)
            assert logits.dtype == torch.float32
            assert_close(logits, expected, torch.float32)
        assert ops.lm_head(x[:0], handle).shape == (0, 101)


@pytest.mark.parametrize("rows_per_tile", [1, 7, 64, 1000])
def test_tiles(rows_per_tile: int, monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    monkeypatch.setattr(reference, "TILE_WEIGHTS", rows_per_tile * 77)
    ops, weight, x = make_ops(), nf4.quantize(randn(65, 77)), randn(4, 77, seed=1)
    y = ops.linear(x, ops.prepare(weight, None), None, 0)
    assert_close(y, x.double() @ weight.dequantize().double().T, torch.float32)


def test_a_cache_that_is_a_view_of_a_larger_tensor() -> None:
    """K and V of a layer may be interleaved in one allocation: writes must reach it, reads must find them."""
    ops = make_ops()
    both = torch.zeros(4, 2, 8, 2, 16)  # [blocks, K or V, block_size, kv_heads, head_dim]
    q, k, v = randn(3, 4, 16), randn(3, 2, 16, seed=1), randn(3, 2, 16, seed=2)
    ones, zeros = torch.ones(3, 8), torch.zeros(3, 8)
    ops.rope_and_cache(q, k, v, ones, zeros, LayerCache(both[:, 0], both[:, 1]), torch.tensor([9, 10, 11]))
    assert torch.equal(both[1, 0, 1:4], k)
    assert torch.equal(both[1, 1, 1:4], v)
