"""Paged attention of every provider against a naive oracle in float64 that knows no blocks."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache, Sequences
from support.kernels.attention_cases import check, make_case
from support.kernels.providers import FAST, INTERPRETED, PROVIDERS, provider_ops
from support.kernels.tolerances import assert_close, relative_l2

DTYPES = (torch.float32, torch.bfloat16)
MakeOps = Callable[..., Any]
poisoned = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=PROVIDERS)
def make_ops(request: pytest.FixtureRequest) -> MakeOps:
    return partial(provider_ops, request.param)


mixed_cases = {
    "shapes": st.lists(
        st.integers(1, 60).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, min(context, 20)))),
        max_size=6,
    ),
    "share": st.sampled_from([1, 3, 4, 8]),
    "kv_heads": st.sampled_from([1, 3]),
    "head_dim": st.sampled_from([8, 20]),
    "block_size": st.sampled_from([8, 16, 64]),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


def check_mixed_batches(
    make_ops: MakeOps,
    nan_poison: None,
    shapes: list[tuple[int, int]],
    share: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if not shapes:
        q = torch.zeros(0, 4, 16, dtype=dtype)
        cache = LayerCache(*torch.zeros(2, 2, 8, 2, 16, dtype=dtype))
        none = torch.zeros(0, dtype=torch.int32)
        sequences = Sequences(none.view(0, 0), none, torch.zeros(1, dtype=torch.int32))
        out = make_ops(dtype).paged_attention(q, cache, sequences, 0.25)
        assert out.shape == q.shape
        return
    case = make_case(
        shapes,
        heads=kv_heads * share,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        seed=seed,
    )
    check(case, make_ops(dtype), dtype)


test_mixed_batches = pytest.mark.parametrize("make_ops", FAST, indirect=True)(
    poisoned(given(**mixed_cases)(check_mixed_batches))
)
test_mixed_batches_interpreted = pytest.mark.parametrize("make_ops", INTERPRETED, indirect=True)(
    settings(poisoned, max_examples=6)(given(**mixed_cases)(check_mixed_batches))
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_sequences_decode_together(make_ops: MakeOps, dtype: torch.dtype, nan_poison: None) -> None:
    """Contexts from 1 to 1000, so that the batch is cut into groups with padding."""
    contexts = [1, 2, 15, 16, 17, 33, 100, 101, 119, 120, 128, 500, 640, 1000]
    random.Random(1).shuffle(contexts)
    check(make_case([(c, 1) for c in contexts], heads=9, kv_heads=3, dtype=dtype), make_ops(dtype), dtype)


@pytest.mark.parametrize("block_size", [8, 64])
def test_a_long_prompt_in_pieces(make_ops: MakeOps, block_size: int, nan_poison: None) -> None:
    """One-shot or cut by the scheduler into steps: the same attention."""
    case = make_case([(400, 350), (90, 90)], block_size=block_size)
    ops = make_ops()
    whole = case.run(ops)
    for i in range(2):
        assert_close(whole[i], case.exact(i), torch.float32)
    for size in (64, 333) if ops.name == "triton" else (1, 64, 333):
        pieces = [case.run(ops, [0], [(first, min(first + size, 350))])[0] for first in range(0, 350, size)]
        assert_close(torch.cat(pieces), whole[0], torch.float32)
        if size == 1:
            assert len(pieces) == 350


def test_one_sequence_does_not_depend_on_the_others_content(make_ops: MakeOps) -> None:
    """Same shapes, other neighbours: not a bit may change."""
    first, second = make_case([(50, 3), (50, 1), (45, 1)], seed=1), make_case([(50, 3), (50, 1), (45, 1)], seed=2)
    mixed = make_case([(50, 3), (50, 1), (45, 1)], seed=2)
    for i in (0, 2):
        blocks = mixed.block_tables[i, : -(-len(first.keys[i]) // 16)].long()
        assert torch.equal(mixed.block_tables, first.block_tables)
        for theirs, ours in zip(mixed.cache.tensors, first.cache.tensors, strict=True):
            theirs[blocks] = ours[blocks]
        mixed.queries[i] = first.queries[i]
    ops = make_ops()
    ours, theirs, both = first.run(ops), second.run(ops), mixed.run(ops)
    assert torch.equal(both[0], ours[0])
    assert torch.equal(both[1], theirs[1])
    assert torch.equal(both[2], ours[2])


@pytest.mark.parametrize("stored", CODE_LIMITS, ids=str)
def test_a_cache_of_8_bits(stored: torch.dtype, nan_poison: None) -> None:
    """By the reference, against float64 of what the codes mean; the kernels are in test_paged_attention.py."""
    shapes = [(60, 20), (33, 1), (1, 1), (16, 16), (40, 1)]
    for dtype in DTYPES:
        check(
            make_case(shapes, heads=6, kv_heads=2, dtype=dtype, stored=stored), provider_ops("reference", dtype), dtype
        )


def test_a_wrong_block_is_found(make_ops: MakeOps) -> None:
    """The planted bug: the comparison must fail with it."""
    case = make_case([(40, 10), (30, 1)], heads=6, kv_heads=3)
    expected = [case.exact(i) for i in range(2)]
    case.block_tables = case.block_tables.roll(1, dims=1)
    for tensor in case.cache.tensors:
        tensor.nan_to_num_()
    for i, out in enumerate(case.run(make_ops())):
        assert not relative_l2(out, expected[i]) <= 1e-2
