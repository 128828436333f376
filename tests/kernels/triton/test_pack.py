"""Weights packed for the Triton kernels: decoded by hand they are the stored weights, merged or not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guanaco.kernels import nf4
from guanaco.kernels.triton.products.pack import CODE_OF_LEVEL, GAIN, TABLE_WORDS, TritonNf4, can_pack, merge, pack_nf4


def _matrix(n: int, k: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.exp(spread * torch.randn(n, 1, generator=generator))


def _level_table() -> Tensor:
    """float64 [16] by code: what the kernels' look-up makes of a nibble, from the bytes of its tables."""
    raw = b"".join(w.to_bytes(4, "little") for w in TABLE_WORDS)
    values = []
    for code in range(16):
        planes = []
        for mine, other in ((raw[:8], raw[8:16]), (raw[16:24], raw[24:])):
            first, second = (mine, other) if code < 8 else (other, mine)
            planes.append(first[code % 8] ^ (0xFF if second[code % 8] & 0x80 else 0))
        values.append(int.from_bytes(bytes(planes), "little"))
    return torch.tensor(values, dtype=torch.int32).to(torch.int16).view(torch.float16).double()


def _decoded(weight: TritonNf4) -> Tensor:
    """float64 [n, k], word by word."""
    shifts = torch.arange(0, 32, 4)
    codes = (weight.words.long().unsqueeze(-1) >> shifts) & 15
    levels = _level_table()[codes].view(weight.n, weight.k)
    return levels * weight.scales().double().repeat_interleave(64).view(weight.n, weight.k)


def _assert_same(packed: TritonNf4, stored: Tensor) -> None:
    """Levels are off by half a last place of float16 at most (2.1e-4 with this gain), scales by float32's rounding.

    A scale is the sum of two terms that may cancel, so its rounding is relative to the larger scales.
    """
    assert packed.words.is_contiguous()
    expected = stored.double()
    assert torch.allclose(_decoded(packed), expected, rtol=2.2e-4, atol=5e-7 * float(expected.abs().max()))


def test_the_levels_are_the_nearest_to_the_gained_ones() -> None:
    expected = (torch.tensor(nf4.LEVELS, dtype=torch.float64) * GAIN).to(torch.float16).double()
    assert torch.equal(_level_table()[list(CODE_OF_LEVEL)], expected)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 33), groups=st.integers(1, 40), double=st.booleans(), seed=st.integers(0, 99))
def test_a_packed_weight_is_the_stored_one(n: int, groups: int, double: bool, seed: int) -> None:
    weight = nf4.quantize(_matrix(n, 64 * groups, seed), double_quant=double)
    packed = pack_nf4(weight)
    assert (packed.n, packed.k, packed.double_quant) == (n, 64 * groups, double)
    _assert_same(packed, weight.dequantize())


@pytest.mark.parametrize("shape", [(8, 4096), (6, 11008), (4, 22016), (64, 576), (1, 64)])
def test_nested_groups_may_cross_rows(shape: tuple[int, int]) -> None:
    weight = nf4.quantize(_matrix(*shape))
    _assert_same(pack_nf4(weight), weight.dequantize())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "stays_double"), [((16, 32, 5), True), ((16, 4, 16), False), ((3, 5), False)])
def test_merged_weights_are_the_parts(rows: tuple[int, ...], stays_double: bool, double: bool) -> None:
    """16 rows of 1,024 are 256 groups: only whole runs of 256 leave the nested scales as they are."""
    weights = [nf4.quantize(_matrix(n, 1024, seed=n + i), double_quant=double) for i, n in enumerate(rows)]
    merged = merge([pack_nf4(w) for w in weights])
    assert merged.double_quant == (stays_double and double)
    assert (merged.n, merged.k) == (sum(rows), 1024)
    _assert_same(merged, torch.cat([w.dequantize() for w in weights]))


def test_a_part_without_nested_scales_is_merged_with_one_that_has_them() -> None:
    weights = [nf4.quantize(_matrix(16, 1024, seed=i), double_quant=i == 0) for i in range(2)]
    merged = merge([pack_nf4(w) for w in weights])
    assert not merged.double_quant
    _assert_same(merged, torch.cat([w.dequantize() for w in weights]))


def test_parts_with_other_maps_are_decoded() -> None:
    weights = [pack_nf4(nf4.quantize(_matrix(16, 1024, seed=i))) for i in range(2)]
    assert weights[1].map is not None
    other = TritonNf4(weights[1].words, weights[1].absmax, weights[1].nested, weights[1].map * 1.5)
    merged = merge([weights[0], other])
    assert not merged.double_quant
    assert torch.equal(merged.scales(), torch.cat([weights[0].scales(), other.scales()]))


def test_one_part_alone_is_itself() -> None:
    packed = pack_nf4(nf4.quantize(_matrix(5, 128)))
    merged = merge([packed])
    assert torch.equal(merged.words, packed.words)
    assert merged.double_quant


def test_rows_that_are_not_whole_groups_are_not_packed() -> None:
    weight = nf4.quantize(_matrix(4, 96))
    assert not can_pack(weight)
    with pytest.raises(AssertionError):
        pack_nf4(weight)


def test_bytes_per_weight() -> None:
    packed = pack_nf4(nf4.quantize(_matrix(256, 4096)))
    assert packed.num_bytes * 8 / (256 * 4096) == pytest.approx(4.127, abs=0.01)
    assert packed.to(torch.device("cpu")).num_bytes == packed.num_bytes


@pytest.mark.parametrize("fault", ["nibbles", "codes", "nested"])
def test_planted_faults_are_seen(fault: str) -> None:
    """The comparison above can fail: swapped nibbles, codes that were not relabelled, a nested group too far."""
    weight = nf4.quantize(_matrix(40, 1024, spread=2.0))
    packed = pack_nf4(weight)
    assert packed.nested is not None
    words, nested = packed.words, packed.nested
    if fault == "nibbles":
        words = (words >> 4 & 0x0F0F0F0F) | (words & 0x0F0F0F0F) << 4
    elif fault == "codes":
        swapped = (weight.packed >> 4) | (weight.packed << 4)
        words = swapped.view(torch.int32).view(40, -1)
    else:
        nested = nested.roll(1, 0)
    with pytest.raises(AssertionError):
        _assert_same(TritonNf4(words, packed.absmax, nested, packed.map), weight.dequantize())
