"""Sequences whose keys and values are scattered over a poisoned paged cache, and their attention in float64.

Every slot of the cache that no sequence has written holds NaN. Used by the attention tests of all providers.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from tolerances import assert_close
from torch import Tensor


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
