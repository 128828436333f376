"""The reference provider's linear, LoRA, norm, rotary and cache ops against naive arithmetic in float64."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from guanaco.kernels import Ops, load_ops, nf4, reference
from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable
from guanaco.kernels.nf4 import Nf4Weight

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
MODULE = 3
poisoned = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_ops(dtype: torch.dtype = torch.float32, budget: int = 0) -> Any:
    return load_ops("reference", device=CPU, dtype=dtype, decoded_weights_bytes=budget)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, entries: list[tuple[tuple[int, float], ...]], table: LoraTable
) -> Tensor:
    """float64: x · Wᵀ + bias + Σ factor · scale · B(A x), row by row and adapter by adapter."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    for row, adapters in enumerate(entries):
        for slot, factor in adapters:
            pair = table.pairs.get((MODULE, slot))
            if pair is not None:
                y[row] += factor * pair.scale * (pair.b.double() @ (pair.a.double() @ x[row].double()))
    return y


def make_table(in_features: int, out_features: int) -> LoraTable:
    """Five adapters of five ranks and three dtypes; slot 4 leaves the module alone. Deltas as large as the base."""
    pairs = {}
    for slot, (rank, dtype) in enumerate(
        [(1, torch.float32), (8, torch.bfloat16), (16, torch.float16), (5, torch.float32)]
    ):
        a = randn(rank, in_features, seed=slot, dtype=dtype)
        b = randn(out_features, rank, seed=slot + 10, dtype=dtype)
        pairs[MODULE, slot] = LoraPair(a, b, scale=0.3 / rank**0.5 * (slot + 1))
    pairs[MODULE + 1, 4] = LoraPair(randn(2, in_features), randn(out_features, 2), 1.0)
    return LoraTable(pairs)


entries_strategy = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 0.5, -2.0])), max_size=3, unique_by=lambda e: e[0]).map(
        tuple
    ),
    max_size=12,
)


@poisoned
@given(
    entries=entries_strategy,
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nf4", "float32", "float16", "bfloat16"]),
    biased=st.booleans(),
    kept=st.booleans(),
)
def test_linear(
    nan_poison: None,
    entries: list[tuple[tuple[int, float], ...]],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    kind: str,
    biased: bool,
    kept: bool,
) -> None:
    ops = make_ops(dtype, budget=(1 << 30) * kept)
    dense = randn(out_features, in_features, seed=1)
    weight = nf4.quantize(dense) if kind == "nf4" else dense.to(getattr(torch, kind))
    exact = weight.dequantize() if isinstance(weight, Nf4Weight) else weight
    bias = randn(out_features, seed=2, dtype=torch.float16) if biased else None
    x = randn(len(entries), in_features, seed=3, dtype=dtype)
    table = make_table(in_features, out_features)
    handle = ops.prepare(weight, bias)
    lora = LoraBatch.build(entries, table, CPU)
    y = ops.linear(x, handle, lora, MODULE)
    assert y.dtype == dtype
    usual_length = float(x.double().norm() * exact.double().norm() / in_features**0.5)
    assert_close(y, exact_linear(x, exact, bias, entries, table), dtype, usual_length)
    plain = ops.linear(x, handle, None, MODULE)
    base_rows = [i for i, adapters in enumerate(entries) if all(slot == 4 for slot, _ in adapters)]
    assert torch.equal(y[base_rows], plain[base_rows]), "base rows changed by their neighbours' adapters"
    empty = LoraBatch.build([() for _ in entries], table, CPU)
    assert torch.equal(ops.linear(x, handle, empty, MODULE), plain)


def test_adapters_together_equal_each_alone() -> None:
    ops, table = make_ops(), make_table(96, 50)
    handle = ops.prepare(nf4.quantize(randn(50, 96)), None)
    x = randn(5, 96, seed=4)
    entries: list[tuple[tuple[int, float], ...]] = [((slot, 1.0),) for slot in range(4)]
    together = ops.linear(x, handle, LoraBatch.build([*entries, ()], table, CPU), MODULE)
    for row, entry in enumerate([*entries, ()]):
        alone = ops.linear(x[row : row + 1], handle, LoraBatch.build([entry], table, CPU), MODULE)
        assert_close(together[row : row + 1], alone, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_swap_of_two_adapter_slots_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the comparison of `test_linear` must fail with it."""
    ops, table = make_ops(dtype), make_table(64, 32)
    handle = ops.prepare(nf4.quantize(randn(32, 64)), None)
    x, entries = randn(4, 64, seed=5, dtype=dtype), [((1, 1.0),), (), ((3, 1.0),), ()]
    expected = exact_linear(x, nf4.quantize(randn(32, 64)).dequantize(), None, entries, table)
    assert_close(ops.linear(x, handle, LoraBatch.build(entries, table, CPU), MODULE), expected, dtype)
    build = LoraBatch.build
    other = {1: 3, 3: 1}
    monkeypatch.setattr(
        LoraBatch,
        "build",
        lambda rows, t, d: build([tuple((other.get(s, s), f) for s, f in row) for row in rows], t, d),
    )
    with pytest.raises(AssertionError, match="relative l2 error"):
        assert_close(ops.linear(x, handle, LoraBatch.build(entries, table, CPU), MODULE), expected, dtype)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_nibble_order_is_found(dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nf4.quantize(randn(32, 64))
    x = randn(4, 64, seed=5, dtype=dtype)
    expected = exact_linear(x, weight.dequantize(), None, [], LoraTable({}))
    pairs = nf4._level_pairs(CPU).view(torch.float32).view(256, 2).flip(1).contiguous()
    monkeypatch.setattr(nf4, "_level_pairs", lambda device: pairs.view(torch.int64).view(-1))
    ops = make_ops(dtype, budget=(1 << 30) * kept)
    with pytest.raises(AssertionError, match="relative l2 error"):
        assert_close(ops.linear(x, ops.prepare(weight, None), None, 0), expected, dtype)


def test_bfloat16_is_rounded_once() -> None:
    """Base, bias and delta are added in float32: the result is the rounding of a float32 sum."""
    table = make_table(64, 40)
    weight, bias = nf4.quantize(randn(40, 64)), randn(40, seed=1)
    x = randn(6, 64, seed=2, dtype=torch.bfloat16)
    lora = LoraBatch.build([((0, 1.0), (2, 1.0))] * 6, table, CPU)
    fine, coarse = make_ops(torch.float32), make_ops(torch.bfloat16)
    exact = fine.linear(x, fine.prepare(weight, bias), lora, MODULE)
    assert torch.equal(coarse.linear(x, coarse.prepare(weight, bias), lora, MODULE), exact.bfloat16())


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0, 1, 5])
def test_embedding_norm_and_activation(t: int, dtype: torch.dtype, nan_poison: None) -> None:
    ops: Ops = make_ops(dtype)
    table = randn(50, 33, dtype=torch.float16)
    ids = torch.randint(0, 50, (t,), generator=torch.Generator().manual_seed(0))
    embedded = ops.embedding(ids, table)
    assert embedded.dtype == dtype
    assert torch.equal(embedded, table[ids].to(dtype))
    x, weight = randn(t, 33, seed=1, dtype=dtype), randn(33, seed=2, dtype=torch.bfloat16)
    square = x.double().square().mean(-1, keepdim=True)
    normed = ops.rms_norm(x * 100, weight, 1e-5)
    assert normed.dtype == dtype
    scaled = (x * 100).double()
    exact = scaled / (scaled.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(normed, exact, dtype)
    assert_close(ops.rms_norm(x * 0, weight, 1e-5), exact * 0, dtype)  # eps keeps a row of zeros finite
    tiny = (x * 1e-4).double()
    exact = tiny / (tiny.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(ops.rms_norm(x * 1e-4, weight, 1e-5), exact, dtype)
    assert square.shape == (t, 1)
    gate, up = randn(t, 33, seed=3, dtype=dtype) * 5, randn(t, 33, seed=4, dtype=dtype)
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    mixed = ops.silu_mul(gate, up)
    assert mixed.dtype == dtype
    assert_close(mixed, exact, dtype)


@poisoned
@given(
    t=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 4), (8, 1)]),
    head_dim=st.sampled_from([2, 16, 64]),
    block_size=st.sampled_from([1, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_rope_and_cache(
    nan_poison: None,
    t: int,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (randn(t, h, head_dim, seed=seed + i, dtype=dtype) for i, h in enumerate((*heads, heads[1])))
    angles = torch.rand(t, head_dim // 2, generator=generator) * 6
    num_slots = 12 * block_size
    slots = torch.randperm(num_slots, generator=generator)[:t]
    slots[torch.rand(t, generator=generator) < 0.3] = -1
    k_cache, v_cache = (torch.empty(12, block_size, heads[1], head_dim, dtype=dtype) for _ in range(2))
    inputs = [tensor.clone() for tensor in (q, k, v)]
    rotated = make_ops(dtype).rope_and_cache(q, k, v, angles.cos(), angles.sin(), k_cache, v_cache, slots)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (q, k, v), strict=True)), "inputs were changed"

    def exact(x: Tensor) -> Tensor:
        """Each pair (i, i + head_dim / 2) as a complex number, times e^(i·angle)."""
        half = head_dim // 2
        turned = torch.complex(x[..., :half].double(), x[..., half:].double())
        c, s = angles.cos().double(), angles.sin().double()
        turned = turned * torch.complex(c, s).unsqueeze(1)
        return torch.cat([turned.real, turned.imag], dim=-1)

    assert rotated.dtype == dtype
    assert_close(rotated, exact(q), dtype)
    written = slots >= 0
    flat_k, flat_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    assert_close(flat_k[slots[written]], exact(k)[written], dtype)
    assert torch.equal(flat_v[slots[written]], v[written])
    untouched = torch.ones(num_slots, dtype=torch.bool)
    untouched[slots[written]] = False
    assert flat_k[untouched].isnan().all()
    assert flat_v[untouched].isnan().all()


def test_a_cache_that_is_a_view_of_a_larger_tensor() -> None:
    """K and V of a layer may be interleaved in one allocation: writes must reach it, reads must find them."""
    ops = make_ops()
    both = torch.zeros(4, 2, 8, 2, 16)  # [blocks, K or V, block_size, kv_heads, head_dim]
    q, k, v = randn(3, 4, 16), randn(3, 2, 16, seed=1), randn(3, 2, 16, seed=2)
    ones, zeros = torch.ones(3, 8), torch.zeros(3, 8)
    ops.rope_and_cache(q, k, v, ones, zeros, both[:, 0], both[:, 1], torch.tensor([9, 10, 11]))
    assert torch.equal(both[1, 0, 1:4], k)
    assert torch.equal(both[1, 1, 1:4], v)
