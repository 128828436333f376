"""Paged attention of the reference provider against a naive oracle in float64 that knows no blocks.

Every slot of the cache that no sequence has written holds NaN.
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close, relative_l2
from torch import Tensor

from guanaco.kernels import load_ops, reference

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
poisoned = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_ops(dtype: torch.dtype = torch.float32) -> Any:
    return load_ops("reference", device=CPU, dtype=dtype, decoded_weights_bytes=0)


@dataclass
class Case:
    """Sequences with their whole K and V, and the same scattered over the blocks of a poisoned cache."""

    keys: list[Tensor]  # [context, kv_heads, head_dim] each
    values: list[Tensor]
    queries: list[Tensor]  # [new, heads, head_dim]: the last positions of each context
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor

    def run(self, ops: Any, rows: list[int] | None = None, news: list[tuple[int, int]] | None = None) -> list[Tensor]:
        """Attention of sequences `rows`, all by default; `news` cuts out queries first … last − 1 of each."""
        rows = list(range(len(self.keys))) if rows is None else rows
        spans = [(0, len(self.queries[i])) for i in rows] if news is None else news
        q = torch.cat([self.queries[i][first:last] for i, (first, last) in zip(rows, spans, strict=True)])
        ends = torch.tensor([0, *(last - first for first, last in spans)]).cumsum(0).int()
        contexts = [len(self.keys[i]) - len(self.queries[i]) + last for i, (_, last) in zip(rows, spans, strict=True)]
        out = ops.paged_attention(
            q,
            self.k_cache,
            self.v_cache,
            self.block_tables[rows],
            torch.tensor(contexts, dtype=torch.int32),
            ends,
            self.scale,
        )
        assert out.dtype == q.dtype
        return list(out.split([last - first for first, last in spans]))

    @property
    def scale(self) -> float:
        return float(self.k_cache.shape[-1] ** -0.5)

    def exact(self, i: int) -> Tensor:
        """float64 [new, heads, head_dim], one head at a time, no blocks."""
        q, k, v = self.queries[i].double(), self.keys[i].double(), self.values[i].double()
        share = q.shape[1] // k.shape[1]
        position, last_seen = torch.arange(len(k)), len(k) - len(q) + torch.arange(len(q))
        hidden = position[None, :] > last_seen[:, None]
        out = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // share].T * self.scale
            out.append(scores.masked_fill(hidden, float("-inf")).softmax(1) @ v[:, head // share])
        return torch.stack(out, dim=1)


def make_case(
    shapes: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """shapes: (context length, new tokens) of each sequence."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    num_blocks = sum(-(-context // block_size) for context, _ in shapes) + 2
    free = list(range(num_blocks))
    random.Random(num_blocks).shuffle(free)
    k_cache, v_cache = (
        torch.full((num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype) for _ in range(2)
    )
    keys, values, queries, tables = [], [], [], []
    for context, new in shapes:
        k, v = randn(context, kv_heads, head_dim), randn(context, kv_heads, head_dim)
        table = [free.pop() for _ in range(-(-context // block_size))]
        position = torch.arange(context)
        block, offset = torch.tensor(table)[position // block_size], position % block_size
        k_cache[block, offset], v_cache[block, offset] = k, v
        keys.append(k)
        values.append(v)
        queries.append(randn(new, heads, head_dim) * 2)
        tables.append(table)
    width = max((len(table) for table in tables), default=0)
    padded = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32).view(len(tables), width)
    return Case(keys, values, queries, k_cache, v_cache, padded)


def check(case: Case, ops: Any, dtype: torch.dtype) -> None:
    for i, out in enumerate(case.run(ops)):
        assert_close(out, case.exact(i), dtype)


@poisoned
@given(
    shapes=st.lists(
        st.integers(1, 60).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, min(context, 20)))),
        max_size=6,
    ),
    share=st.sampled_from([1, 3, 4, 8]),
    kv_heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([8, 20]),
    block_size=st.sampled_from([8, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_mixed_batches(
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
        cache = torch.zeros(2, 8, 2, 16, dtype=dtype)
        none = torch.zeros(0, dtype=torch.int32)
        out = make_ops(dtype).paged_attention(
            q, cache, cache, none.view(0, 0), none, torch.zeros(1, dtype=torch.int32), 0.25
        )
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_sequences_decode_together(dtype: torch.dtype, nan_poison: None) -> None:
    """Contexts from 1 to 1000, so that the batch is cut into groups with padding."""
    contexts = [1, 2, 15, 16, 17, 33, 100, 101, 119, 120, 128, 500, 640, 1000]
    random.Random(1).shuffle(contexts)
    check(make_case([(c, 1) for c in contexts], heads=9, kv_heads=3, dtype=dtype), make_ops(dtype), dtype)


@pytest.mark.parametrize("block_size", [8, 64])
def test_a_long_prompt_in_pieces(block_size: int, monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    """One-shot, cut by the scheduler into steps, and cut by the op itself to save memory: the same attention."""
    case = make_case([(400, 350), (90, 90)], block_size=block_size)
    ops = make_ops()
    whole = case.run(ops)
    for i in range(2):
        assert_close(whole[i], case.exact(i), torch.float32)
    for size in (1, 64, 333):
        pieces = [case.run(ops, [0], [(first, min(first + size, 350))])[0] for first in range(0, 350, size)]
        assert_close(torch.cat(pieces), whole[0], torch.float32)
        if size == 1:
            assert len(pieces) == 350
    monkeypatch.setattr(reference, "ATTENTION_SCORES", 4 * 400 * 10)
    assert_close(case.run(ops)[0], whole[0], torch.float32)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the inner function sees more scores or keys than the limits, unless one query or sequence needs it."""
    monkeypatch.setattr(reference, "ATTENTION_SCORES", 4 * 256 * 10)
    monkeypatch.setattr(reference, "GATHERED_KEYS", 2 * 16 * 1000)
    prompt, decode = [], []
    attend = reference._attend

    def spy(q: Tensor, keys: Tensor, values: Tensor, limits: Tensor, scale: float) -> Tensor:
        if q.shape[1] > 1:
            prompt.append(q.shape[1] * q.shape[2] * keys.shape[2])
        else:
            decode.append(keys.numel())
        return attend(q, keys, values, limits, scale)

    monkeypatch.setattr(reference, "_attend", spy)
    check(make_case([(256, 250), (1200, 1), *((200 + i, 1) for i in range(30))]), make_ops(), torch.float32)
    assert max(prompt) <= 4 * 256 * 10
    assert len(prompt) == 25
    *batches, alone = sorted(decode)
    assert alone == 1200 * 2 * 16
    assert 2 * 16 * 900 < max(batches) <= 2 * 16 * 1000
    assert len(decode) <= 10


def test_padding_of_decode_groups_is_bounded() -> None:
    generator = random.Random(0)
    for _ in range(50):
        contexts = [(generator.choice([1, 7, 40, 41, 300, 2000]) + generator.randrange(9), i) for i in range(40)]
        groups = reference._decode_groups(contexts, max_positions=1000)
        assert sorted(i for group in groups for i in group) == list(range(40))
        length = {i: n for n, i in contexts}
        for group in groups:
            longest = max(length[i] for i in group)
            assert length[group[-1]] == longest
            assert min(length[i] for i in group) >= longest * 0.75
            assert len(group) == 1 or len(group) * longest <= 1000


def test_one_sequence_does_not_depend_on_the_others_content() -> None:
    """Same shapes, other neighbours: not a bit may change."""
    first, second = make_case([(50, 3), (50, 1), (45, 1)], seed=1), make_case([(50, 3), (50, 1), (45, 1)], seed=2)
    mixed = make_case([(50, 3), (50, 1), (45, 1)], seed=2)
    for i in (0, 2):
        blocks = mixed.block_tables[i, : -(-len(first.keys[i]) // 16)].long()
        assert torch.equal(mixed.block_tables, first.block_tables)
        mixed.k_cache[blocks], mixed.v_cache[blocks] = first.k_cache[blocks], first.v_cache[blocks]
        mixed.queries[i] = first.queries[i]
    ops = make_ops()
    ours, theirs, both = first.run(ops), second.run(ops), mixed.run(ops)
    assert torch.equal(both[0], ours[0])
    assert torch.equal(both[1], theirs[1])
    assert torch.equal(both[2], ours[2])


@pytest.mark.parametrize("bug", ["causal", "block", "head"])
def test_planted_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must fail for a mask off by one, a wrong block in the table, and heads that share wrongly."""
    case = make_case([(40, 10), (30, 1)], heads=6, kv_heads=3)
    ops = make_ops()
    expected = [case.exact(i) for i in range(2)]
    attend = reference._attend
    if bug == "causal":
        monkeypatch.setattr(reference, "_attend", lambda q, k, v, limits, s: attend(q, k, v, limits - 1, s))
    elif bug == "block":
        case.block_tables = case.block_tables.roll(1, dims=1)
        case.k_cache, case.v_cache = case.k_cache.nan_to_num(), case.v_cache.nan_to_num()
    else:
        monkeypatch.setattr(reference, "_attend", lambda q, k, v, limits, s: attend(q.roll(1, 2), k, v, limits, s))
    for i, out in enumerate(case.run(ops)):
        assert not relative_l2(out, expected[i]) <= 1e-2
