"""The linear, LoRA, norm, rotary and cache ops of every provider against naive arithmetic in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from guanaco.kernels import Ops, nf4
from guanaco.kernels.layer_cache import LayerCache
from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable
from guanaco.kernels.nf4 import Nf4Weight
from support.kernels.providers import FAST, INTERPRETED, PROVIDERS, provider_ops
from support.kernels.tolerances import assert_close

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
MODULE = 3
MakeOps = Callable[..., Any]
poisoned = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(poisoned, max_examples=6)
on_fast = pytest.mark.parametrize("make_ops", FAST, indirect=True)
on_interpreted = pytest.mark.parametrize("make_ops", INTERPRETED, indirect=True)


@pytest.fixture(params=PROVIDERS)
def make_ops(request: pytest.FixtureRequest) -> MakeOps:
    """`make_ops(dtype, budget=…)` of each provider in turn."""
    return partial(provider_ops, request.param)


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


def rounding(ops: Ops, in_features: int) -> dict[str, bool]:
    """How this provider's product of NF4 weights rounds, for `assert_close`: only rows of whole groups are packed."""
    packed = in_features % nf4.GROUP_SIZE == 0
    return {"integer_nf4": packed and ops.name == "cpu", "half_nf4": packed and ops.name == "triton"}


entries_strategy = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 0.5, -2.0])), max_size=3, unique_by=lambda e: e[0]).map(
        tuple
    ),
    max_size=12,
)


linear_cases = {
    "entries": entries_strategy,
    "in_features": st.integers(1, 200),
    "out_features": st.integers(1, 90),
    "dtype": st.sampled_from(DTYPES),
    "kind": st.sampled_from(["nf4", "float32", "float16", "bfloat16"]),
    "biased": st.booleans(),
    "kept": st.booleans(),
}


def check_linear(
    make_ops: MakeOps,
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
    expected = exact_linear(x, exact, bias, entries, table)
    assert_close(y, expected, dtype, usual_length, **(rounding(ops, in_features) if kind == "nf4" else {}))
    plain = ops.linear(x, handle, None, MODULE)
    base_rows = [i for i, adapters in enumerate(entries) if all(slot == 4 for slot, _ in adapters)]
    assert torch.equal(y[base_rows], plain[base_rows]), "base rows changed by their neighbours' adapters"
    empty = LoraBatch.build([() for _ in entries], table, CPU)
    assert torch.equal(ops.linear(x, handle, empty, MODULE), plain)


test_linear = on_fast(poisoned(given(**linear_cases)(check_linear)))
# The same, and only what the kernels take.
packed_cases = {**linear_cases, "in_features": st.sampled_from([64, 192]), "kind": st.just("nf4")}
test_linear_interpreted = on_interpreted(few(given(**linear_cases)(check_linear)))
test_packed_linear_interpreted = on_interpreted(few(given(**packed_cases)(check_linear)))


def test_adapters_together_equal_each_alone(make_ops: MakeOps) -> None:
    ops, table = make_ops(), make_table(192, 50)
    handle = ops.prepare(nf4.quantize(randn(50, 192)), None)
    x = randn(5, 192, seed=4)
    entries: list[tuple[tuple[int, float], ...]] = [((slot, 1.0),) for slot in range(4)]
    together = ops.linear(x, handle, LoraBatch.build([*entries, ()], table, CPU), MODULE)
    for row, entry in enumerate([*entries, ()]):
        alone = ops.linear(x[row : row + 1], handle, LoraBatch.build([entry], table, CPU), MODULE)
        # The triton provider takes one kernel for five rows and another for one.
        assert_close(together[row : row + 1], alone, torch.float32, half_nf4=ops.name == "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_swap_of_two_adapter_slots_is_found(
    make_ops: MakeOps, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: the comparison of `test_linear` must fail with it."""
    ops, table = make_ops(dtype), make_table(64, 32)
    handle = ops.prepare(nf4.quantize(randn(32, 64)), None)
    x, entries = randn(4, 64, seed=5, dtype=dtype), [((1, 1.0),), (), ((3, 1.0),), ()]
    expected = exact_linear(x, nf4.quantize(randn(32, 64)).dequantize(), None, entries, table)
    assert_close(
        ops.linear(x, handle, LoraBatch.build(entries, table, CPU), MODULE),
        expected,
        dtype,
        **rounding(ops, 64),
    )
    build = LoraBatch.build
    other = {1: 3, 3: 1}
    monkeypatch.setattr(
        LoraBatch,
        "build",
        lambda rows, t, d: build([tuple((other.get(s, s), f) for s, f in row) for row in rows], t, d),
    )
    with pytest.raises(AssertionError, match="relative l2 error"):
        assert_close(
            ops.linear(x, handle, LoraBatch.build(entries, table, CPU), MODULE),
            expected,
            dtype,
            **rounding(ops, 64),
        )


def test_bfloat16_is_rounded_once(make_ops: MakeOps) -> None:
    """Base, bias and delta are added in float32: the result is the rounding of a float32 sum."""
    table = make_table(64, 40)
    weight, bias = nf4.quantize(randn(40, 64)), randn(40, seed=1)
    x = randn(6, 64, seed=2, dtype=torch.bfloat16)
    lora = LoraBatch.build([((0, 1.0), (2, 1.0))] * 6, table, CPU)
    fine, coarse = make_ops(torch.float32), make_ops(torch.bfloat16)
    exact = fine.linear(x, fine.prepare(weight, bias), lora, MODULE)
    assert torch.equal(coarse.linear(x, coarse.prepare(weight, bias), lora, MODULE), exact.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0, 1, 5])
def test_embedding_norm_and_activation(make_ops: MakeOps, t: int, dtype: torch.dtype, nan_poison: None) -> None:
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


rope_cases = {
    "t": st.integers(0, 9),
    "heads": st.sampled_from([(1, 1), (9, 3), (4, 4), (8, 1)]),
    "head_dim": st.sampled_from([2, 16, 64]),
    "block_size": st.sampled_from([1, 8, 16]),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


def check_rope_and_cache(
    make_ops: MakeOps,
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
    cache = LayerCache(*(torch.empty(12, block_size, heads[1], head_dim, dtype=dtype) for _ in range(2)))
    inputs = [tensor.clone() for tensor in (q, k, v)]
    rotated = make_ops(dtype).rope_and_cache(q, k, v, angles.cos(), angles.sin(), cache, slots)
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
    flat_k, flat_v = (tensor.flatten(0, 1) for tensor in cache.tensors)
    assert_close(flat_k[slots[written]], exact(k)[written], dtype)
    assert torch.equal(flat_v[slots[written]], v[written])
    untouched = torch.ones(num_slots, dtype=torch.bool)
    untouched[slots[written]] = False
    assert flat_k[untouched].isnan().all()
    assert flat_v[untouched].isnan().all()


test_rope_and_cache = on_fast(poisoned(given(**rope_cases)(check_rope_and_cache)))
test_rope_and_cache_interpreted = on_interpreted(few(given(**rope_cases)(check_rope_and_cache)))
