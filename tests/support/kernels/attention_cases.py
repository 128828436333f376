"""Sequences whose keys and values are scattered over a poisoned paged cache, and their attention in float64.

Every slot of the cache that no sequence has written holds NaN. Used by the attention tests of all providers.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache, Sequences, quantise_heads
from support.kernels.tolerances import assert_close, relative_l2


@dataclass
class Case:
    """Sequences with their whole K and V, and the same scattered over the blocks of a poisoned cache."""

    keys: list[Tensor]  # [context, kv_heads, head_dim] each
    values: list[Tensor]
    queries: list[Tensor]  # [new, heads, head_dim]: the last positions of each context
    cache: LayerCache
    block_tables: Tensor

    def run(self, ops: Any, rows: list[int] | None = None, news: list[tuple[int, int]] | None = None) -> list[Tensor]:
        """Attention of sequences `rows`, all by default; `news` cuts out queries first … last − 1 of each."""
        rows = list(range(len(self.keys))) if rows is None else rows
        spans = [(0, len(self.queries[i])) for i in rows] if news is None else news
        q = torch.cat([self.queries[i][first:last] for i, (first, last) in zip(rows, spans, strict=True)])
        ends = torch.tensor([0, *(last - first for first, last in spans)]).cumsum(0).int()
        contexts = [len(self.keys[i]) - len(self.queries[i]) + last for i, (_, last) in zip(rows, spans, strict=True)]
        sequences = Sequences(self.block_tables[rows], torch.tensor(contexts, dtype=torch.int32), ends)
        out = ops.paged_attention(q, self.cache, sequences, self.scale)
        assert out.dtype == q.dtype
        return list(out.split([last - first for first, last in spans]))

    @property
    def scale(self) -> float:
        return float(self.cache.k.shape[-1] ** -0.5)

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
    stored: torch.dtype | None = None,
    values_scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """shapes: (context length, new tokens) of each sequence. stored: the cache's dtype if it has 8 bits; the case's
    keys and values are then what the codes mean."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    num_blocks = sum(-(-context // block_size) for context, _ in shapes) + 2
    free = list(range(num_blocks))
    random.Random(num_blocks).shuffle(free)
    cache = poisoned_cache((num_blocks, block_size, kv_heads, head_dim), stored or dtype)
    keys, values, queries, tables = [], [], [], []
    for context, new in shapes:
        k, v = randn(context, kv_heads, head_dim), randn(context, kv_heads, head_dim) * values_scale
        table = [free.pop() for _ in range(-(-context // block_size))]
        position = torch.arange(context)
        block, offset = torch.tensor(table)[position // block_size], position % block_size
        keys.append(_write(k, cache.k, cache.k_scales, block, offset))
        values.append(_write(v, cache.v, cache.v_scales, block, offset))
        queries.append(randn(new, heads, head_dim) * 2)
        tables.append(table)
    width = max((len(table) for table in tables), default=0)
    padded = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32).view(len(tables), width)
    return Case(keys, values, queries, cache, padded)


def poisoned_cache(shape: tuple[int, int, int, int], dtype: torch.dtype) -> LayerCache:
    """NaN in every place, or where int8 has none a code that is nobody's zero."""

    def poison(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.full(size, 113 if kind == torch.int8 else float("nan")).to(kind)

    return LayerCache.made(shape, dtype, poison)


def check_codes(codes: Tensor, scales: Tensor, exact: Tensor) -> None:
    """8-bit codes [t, heads, head_dim] with scales [t, heads] of float64 `exact`: every head uses the whole range, and
    no element is off by more than half a step."""
    limit = CODE_LIMITS[codes.dtype]
    torch.testing.assert_close(scales.double(), exact.abs().amax(-1) / limit, rtol=1e-6, atol=0)
    assert torch.equal(codes.float().abs().amax(-1), torch.where(scales > 0, limit, 0.0))
    scale = scales.double().unsqueeze(-1)
    step = torch.ones_like(exact)
    if codes.dtype == torch.float8_e4m3fn:  # three bits of mantissa, the smallest step is 2^-9
        _, exponent = torch.frexp(exact / scale)
        step = torch.ldexp(step, (exponent - 4).clamp(min=-9))
    assert ((codes.double() * scale - exact).abs() <= 0.501 * step * scale).all()


def _write(x: Tensor, stored: Tensor, scales: Tensor | None, block: Tensor, offset: Tensor) -> Tensor:
    """Put x [n, heads, head_dim] into the cache; what it is there."""
    if scales is None:
        stored[block, offset] = x
        return x
    codes, factors = quantise_heads(x.float(), stored.dtype)
    stored[block, offset], scales[block, :, offset] = codes, factors
    meant = codes.double() * factors.double().unsqueeze(-1)
    assert relative_l2(meant, x.double()) <= (0.02 if stored.dtype == torch.int8 else 0.05)
    return meant


def check(case: Case, ops: Any, dtype: torch.dtype) -> None:
    for i, out in enumerate(case.run(ops)):
        assert_close(out, case.exact(i), dtype)
