"""Attention by the Triton kernels, in Triton's interpreter, against float64; and what their machine code says."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.kernels import attention_cases
from support.kernels.attention_cases import Case, make_case
from support.kernels.tolerances import RELATIVE_L2, relative_l2

pytest.importorskip("triton")

from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.memory import mapped_zeros
from guanaco.kernels.triton.attention.paged import Tiles, num_splits, paged_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float16: weights and result are rounded to 11 bits, 2.1e-4 in the root mean square each.
TOLERANCE = {**RELATIVE_L2, torch.float16: 6e-4}
# Short tiles, so that short contexts have several of them.
SHORT = Tiles(16, 4, 16, 2, 2, 16, 16, 4, 2)
POISONED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@dataclass
class Attention:
    """`Ops.paged_attention` by the kernels, as `attention_cases` calls it."""

    programs: int = 64
    tiles: Tiles | None = SHORT
    target: str = "sm_80"

    def paged_attention(self, q: Tensor, cache: LayerCache, sequences: Sequences, scale: float) -> Tensor:
        out = torch.empty_like(q)
        most = int(sequences.cu_seqlens_q.diff().max()) if len(sequences.context_lens) else 1
        paged_attention(
            q, cache, sequences, scale, out,
            max_new=most, programs=self.programs, tiles=self.tiles, target=self.target,
        )  # fmt: skip
        return out


def check(case: Case, attention: Attention, tolerance: float | None = None) -> None:
    """Every sequence of the case; entries of its block table that no position needs point nowhere."""
    width = case.block_tables.shape[1]
    unused = torch.arange(width + 3) >= torch.tensor([-(-len(k) // case.cache.block_size) for k in case.keys])[:, None]
    case.block_tables = torch.nn.functional.pad(case.block_tables, (0, 3)).masked_fill(unused, 1 << 30)
    for i, out in enumerate(case.run(attention)):
        error = relative_l2(out, case.exact(i))
        assert error <= (tolerance or TOLERANCE[out.dtype]), f"sequence {i}: relative l2 error {error:.3g}"


@settings(max_examples=15, **POISONED)
@given(
    shapes=st.lists(
        st.integers(1, 60).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, min(context, 20)))),
        min_size=1,
        max_size=4,
    ),
    share=st.sampled_from([1, 3, 4, 8]),
    kv_heads=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([8, 20, 64, 80, 96, 128]),
    block_size=st.sampled_from([8, 16, 24, 64]),
    dtype=st.sampled_from(DTYPES),
    programs=st.sampled_from([1, 30, 200]),
    seed=st.integers(0, 1000),
)
def test_mixed_batches(
    nan_poison: None, shapes: list[tuple[int, int]], share: int, kv_heads: int, head_dim: int, block_size: int,
    dtype: torch.dtype, programs: int, seed: int,
) -> None:  # fmt: skip
    heads = kv_heads * share
    case = make_case(
        shapes, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=seed
    )
    check(case, Attention(programs))


@pytest.mark.parametrize("share", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("programs", [1, 40])
def test_decoding_contexts_from_1_to_1000(nan_poison: None, programs: int, dtype: torch.dtype, share: int) -> None:
    """With and without splits, in the tiles that are shipped."""
    contexts = [1, 2, 31, 32, 33, 100, 257, 640, 1000]
    case = make_case([(c, 1) for c in contexts], heads=share, kv_heads=1, head_dim=64, dtype=dtype, seed=share)
    check(case, Attention(programs, tiles=None))


@pytest.mark.parametrize(("target", "share"), [("sm_75", 3), ("sm_80", 1), ("sm_80", 8), ("sm_90", 1), ("sm_90", 3)])
def test_prompts_in_the_tiles_that_are_shipped(nan_poison: None, target: str, share: int) -> None:
    """A whole prompt, the end of one, one that fills tiles exactly, and sequences that decode beside them."""
    shapes = [(150, 150), (1000, 20), (1, 1), (64, 64), (500, 1), (65, 2)]
    case = make_case(shapes, heads=share, kv_heads=1, head_dim=80, dtype=torch.bfloat16)
    check(case, Attention(tiles=None, target=target))


def test_a_long_prompt_in_pieces(nan_poison: None) -> None:
    """One-shot or cut by the scheduler into steps: the same attention."""
    case = make_case([(400, 350)], block_size=8)
    attention = Attention(tiles=None)
    whole = case.run(attention)[0]
    for size in (64, 333):
        cuts = [(first, min(first + size, 350)) for first in range(0, 350, size)]
        pieces = torch.cat([case.run(attention, [0], [cut])[0] for cut in cuts])
        assert relative_l2(pieces, whole.double()) <= TOLERANCE[torch.float32]


def test_large_scores_do_not_overflow(nan_poison: None) -> None:
    """The softmax is one of differences. Scores of some 3,000 are known to 3,000 · 2^-24 = 2e-4, and so are weights."""
    for heads in (1, 4):
        case = make_case([(100, 1), (100, 30)], heads=heads, kv_heads=1, head_dim=16)
        case.queries = [q * 300 for q in case.queries]
        check(case, Attention(), tolerance=2e-4)


# ---- the same bits


def test_one_sequence_does_not_depend_on_the_others_content(nan_poison: None) -> None:
    """Same shapes, other neighbours: not a bit may change."""
    shapes = [(50, 3), (50, 1), (45, 1)]
    first, second, mixed = (make_case(shapes, seed=seed) for seed in (1, 2, 2))
    for i in (0, 2):
        blocks = mixed.block_tables[i, : -(-len(first.keys[i]) // 16)].long()
        for theirs, ours in zip(mixed.cache.tensors, first.cache.tensors, strict=True):
            theirs[blocks] = ours[blocks]
        mixed.queries[i] = first.queries[i]
    ours, theirs, both = (case.run(Attention()) for case in (first, second, mixed))
    assert [torch.equal(a, b) for a, b in zip(both, (ours[0], theirs[1], ours[2]), strict=True)] == [True] * 3


def test_padding_rows_of_a_graph(nan_poison: None) -> None:
    """A bucket that is larger than the batch: zeros for the padding, the same bits for the others."""
    for heads in (2, 4):
        for programs in (1, 100):
            case = make_case([(40, 1), (7, 1)], heads=heads, kv_heads=2)
            plain = torch.cat(case.run(Attention(programs)))
            q = torch.cat([*case.queries, torch.full((2, heads, 16), float("nan"))])
            tables = torch.nn.functional.pad(case.block_tables, (0, 0, 0, 2), value=1 << 30)
            contexts, starts = torch.tensor([40, 7, 0, 0], dtype=torch.int32), torch.arange(5, dtype=torch.int32)
            sequences = Sequences(tables, contexts, starts)
            padded = Attention(programs * 2).paged_attention(q, case.cache, sequences, case.scale)
            assert torch.equal(padded[:2], plain)
            assert torch.equal(padded[2:], torch.zeros(2, heads, 16))


def test_number_of_splits() -> None:
    """A power of two that is enough for the card, as far as there are tiles; the batch's lengths play no part."""
    assert num_splits(1, 8, 4096, 32, 256) == 32
    assert num_splits(1, 8, 100, 32, 256) == 1
    assert num_splits(1, 8, 1000, 32, 256) == 8
    assert num_splits(64, 32, 4096, 32, 256) == 1
    assert num_splits(1, 1, 1 << 20, 32, 10_000) == 128
    assert num_splits(1, 3, 0, 32, 256) == 1


# ---- caches of 8 bits


@settings(max_examples=8, **POISONED)
@given(
    shapes=st.lists(
        st.integers(1, 70).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, min(context, 20)))),
        min_size=1,
        max_size=3,
    ),
    stored=st.sampled_from([torch.int8, torch.float8_e4m3fn]),
    share=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([20, 64, 128]),
    block_size=st.sampled_from([8, 16]),
    dtype=st.sampled_from(DTYPES),
    programs=st.sampled_from([1, 60]),
    small=st.booleans(),
)
def test_quantised_caches(
    nan_poison: None, shapes: list[tuple[int, int]], stored: torch.dtype, share: int, head_dim: int, block_size: int,
    dtype: torch.dtype, programs: int, small: bool,
) -> None:  # fmt: skip
    """Against float64 of the stored codes times their scales; `small`: scales whose products float16 can't hold."""
    case = make_case(
        shapes, heads=2 * share, kv_heads=2, head_dim=head_dim, block_size=block_size, dtype=dtype, stored=stored,
        values_scale=1e-3 if small and dtype != torch.float16 else 1.0,
    )  # fmt: skip
    check(case, Attention(programs))


def test_blocks_beyond_two_thousand_million_elements() -> None:
    """Offsets are 64 bits wide: the sequence lies at the end of a cache that is mapped, but not in memory."""
    blocks = (1 << 31) // (16 * 64) + 4
    for heads in (1, 4):
        case = make_case([(30, 1), (30, 5)], heads=heads, kv_heads=1, head_dim=64, stored=torch.int8)
        large = LayerCache.made((blocks, 16, 1, 64), torch.int8, mapped_zeros)
        first = blocks - len(case.cache.k)
        for target, source in zip(large.tensors, case.cache.tensors, strict=True):
            target[first:] = source
        case.cache = large
        case.block_tables += first
        check(case, Attention())


# ---- planted bugs


@pytest.mark.parametrize("heads", [1, 4])
def test_planted_bugs_are_found(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong block, a context that is one too long or too short, a scale without log2(e): the checks must fail."""

    def case() -> Case:
        return make_case([(40, 10), (30, 1)], heads=heads, kv_heads=1, head_dim=32)

    check(case(), Attention())
    wrong = case()
    wrong.block_tables = wrong.block_tables.roll(1, dims=1)
    with pytest.raises(AssertionError, match="relative l2"):
        check(wrong, Attention())
    for step in (-1, 1):
        shifted = case()
        monkeypatch.setattr(
            attention_cases, "len", lambda x, step=step: len(x) + step * (len(x) in (30, 40)), raising=False
        )
        outs = shifted.run(Attention())
        monkeypatch.undo()
        assert not all(relative_l2(out, shifted.exact(i)) <= 1e-3 for i, out in enumerate(outs))
    monkeypatch.setattr(math, "log2", lambda _: 1.0)
    with pytest.raises(AssertionError, match="relative l2"):
        check(case(), Attention())
