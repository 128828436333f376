"""Checks every op of the `triton` provider against float64 or the reference, on its device. For `gpu_check.py`.

Each check yields one row: what was computed, its relative l2 distance from the expected result, and the allowed one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from guanaco.kernels import Draw, load_ops, nf4
from guanaco.kernels.layer_cache import LayerCache, decoded
from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample
from support.kernels.attention_cases import make_case
from support.kernels.tolerances import relative_l2

# Ceiling for products of NF4 weights; the interpreter's results are at 4e-4 and below.
NF4_ALLOWED = 1.5e-3
# float32 in, float32 out, sums in another order; tensor cores may round float32 operands of attention to tf32.
FLOAT32_ALLOWED, ATTENTION_ALLOWED = 2e-6, 1e-3
HALF_ALLOWED = 4e-3  # 16-bit activations: one rounding of the result to 8 bits
# 8-bit caches: a number halfway between two codes may get the other code if its last bit differs.
CODES_ALLOWED = 5e-3
DRAWS: list[dict[str, Any]] = [
    {"temperature": temperature, **filters}
    for temperature in (0.3, 1.0, 2.0)
    for filters in ({}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.95}, {"min_p": 0.05})
]
RANKS = (4, 8, 16, 5, 64, 32, 128, 12)


@dataclass(frozen=True)
class Check:
    what: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_checks(
    ops: Any, shapes: Sequence[tuple[int, int]], rows: Sequence[int], adapters: Sequence[int]
) -> Iterator[Check]:
    """Compare linear() with a bias to float64, for base rows and rows with adapters. Base rows must keep their bits."""
    device = ops.device
    for n, k in shapes:
        weight = nf4.quantize(_randn(n, k, seed=n)).to(device)
        exact = weight.dequantize().double()
        bias = _randn(n, seed=1).to(device)
        handle = ops.prepare(weight, bias)
        pairs = {
            (0, slot): LoraPair(
                _randn(rank, k, seed=slot).to(device), _randn(n, rank, seed=9 + slot).to(device), (rank * 4) ** -0.5
            )
            for slot, rank in enumerate(RANKS)
        }
        table = LoraTable(pairs)
        for count in rows:
            x = _randn(count, k, seed=count).to(device, ops.dtype)
            base = x.double() @ exact.T + bias.double()
            plain = ops.linear(x, handle, None, 0)
            for num in adapters:
                entries: list[tuple[tuple[int, float], ...]] = [
                    () if num == 0 or row % (num + 1) == num else ((row % (num + 1), 0.5),) for row in range(count)
                ]
                lora = LoraBatch.build(entries, table, device) if any(entries) else None
                y = ops.linear(x, handle, lora, 0)
                expected = base.clone()
                for row, entry in enumerate(entries):
                    for slot, factor in entry:
                        pair = pairs[0, slot]
                        expected[row] += factor * pair.scale * (pair.b.double() @ (pair.a.double() @ x[row].double()))
                what = f"{n} x {k}, {count} rows, {num} adapters"
                yield Check(what, relative_l2(y, expected), NF4_ALLOWED if ops.dtype == torch.float32 else HALF_ALLOWED)
                same = all(torch.equal(y[row], plain[row]) for row, entry in enumerate(entries) if not entry)
                yield Check(f"{what}: base rows keep their bits", 0.0 if same else 1.0, 0.0)


def layer_checks(ops: Any, *, hidden: int, head_dim: int, heads: int, kv_heads: int) -> Iterator[Check]:
    """Compare the ops between the products to the reference on the same device in float32."""
    device, tokens = ops.device, 7
    reference = load_ops("reference", device=device, dtype=torch.float32)
    allowed = FLOAT32_ALLOWED if ops.dtype == torch.float32 else HALF_ALLOWED

    def made(*shape: int, seed: int) -> Tensor:
        return _randn(*shape, seed=seed).to(device, ops.dtype)

    def zeros(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    x, weight = made(tokens, hidden, seed=1), made(hidden, seed=2)
    yield Check("rms_norm", relative_l2(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)), allowed)
    gate, up = made(tokens, hidden, seed=3), made(tokens, hidden, seed=4)
    yield Check("silu_mul", relative_l2(ops.silu_mul(gate, up), reference.silu_mul(gate, up)), allowed)
    table, ids = made(50, hidden, seed=5), torch.arange(0, 49, 7, device=device)
    yield Check("embedding", relative_l2(ops.embedding(ids, table), reference.embedding(ids, table)), 0.0)
    q, k, v = (made(tokens, h, head_dim, seed=6 + i) for i, h in enumerate((heads, kv_heads, kv_heads)))
    angles = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(0)).to(device) * 6
    slots = torch.tensor([3, 0, -1, 17, 8, 30, 31], device=device)
    arguments = (q, k, v, angles.cos(), angles.sin())
    for stored in (ops.dtype, *ops.cache_dtypes):
        ours, theirs = (LayerCache.made((2, 16, kv_heads, head_dim), stored, zeros) for _ in range(2))
        rotated = ops.rope_and_cache(*arguments, ours, slots)
        expected = reference.rope_and_cache(*arguments, theirs, slots)
        yield Check(f"rope beside a cache of {stored}", relative_l2(rotated, expected), allowed)
        keys = (decoded(cache.k, cache.k_scales) for cache in (ours, theirs))
        values = (decoded(cache.v, cache.v_scales) for cache in (ours, theirs))
        error = max(relative_l2(*keys), relative_l2(*values))
        yield Check(f"KV write, {stored}", error, allowed if stored == ops.dtype else CODES_ALLOWED)
    logits = _randn(5, 1000, seed=9).to(device)
    logits[:, 700] = logits.max() + 1
    logits[:, 900] = logits[:, 700]
    drawn = ops.draw(logits, [Draw(0.0, 0, 1.0, 0.0, 0.0)] * 5)
    yield Check("argmax, the lowest of equal ones", 0.0 if drawn == [700] * 5 else 1.0, 0.0)
    logits = _randn(len(DRAWS), 1000, seed=10).to(device) * 3
    rows = [SamplingRow(SamplingParams(max_tokens=1, seed=i, **draw), (), []) for i, draw in enumerate(DRAWS)]
    ours, theirs = (sample(logits, rows, frozenset(), drawing) for drawing in (ops, None))
    parted = sum(a.token_id != b.token_id for a, b in zip(ours, theirs, strict=True))
    yield Check(f"drawn tokens that are not the sampler's, of {len(rows)}", float(parted), 0.0)


def attention_checks(
    ops: Any, shapes: Sequence[tuple[int, int]], groups: Sequence[int], head_dim: int, block_sizes: Sequence[int]
) -> Iterator[Check]:
    """Compare decode and chunked prompts to float64. Unused parts of the scattered cache are poisoned."""
    device = ops.device
    allowed = ATTENTION_ALLOWED if ops.dtype == torch.float32 else HALF_ALLOWED
    for stored, group, block_size, decode in product((None, *ops.cache_dtypes), groups, block_sizes, (True, False)):
        chosen = [(context, 1) for context, _ in shapes] if decode else list(shapes)
        case = make_case(
            chosen,
            heads=2 * group,
            kv_heads=2,
            head_dim=head_dim,
            block_size=block_size,
            dtype=ops.dtype,
            stored=stored,
        )
        expected = [case.exact(i) for i in range(len(chosen))]
        case.cache = LayerCache(*(tensor.to(device) for tensor in case.cache.tensors))
        case.block_tables = case.block_tables.to(device)
        case.queries = [query.to(device) for query in case.queries]
        with torch.device(device):  # for the tensors that the case makes while it runs
            outs = case.run(ops)
        error = max(relative_l2(out.cpu(), exact) for out, exact in zip(outs, expected, strict=True))
        kind = f"{'decode' if decode else 'prompts'}, cache of {stored or ops.dtype}"
        yield Check(f"attention, {kind}, {group} heads a group, blocks of {block_size}", error, allowed)
