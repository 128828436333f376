"""NF4 weights as the Triton kernels read them: codes relabelled for a look-up by byte permutes, scales as stored.

Plain torch on any device; knows no kernel. The provider packs each weight once. `merge` stacks the matrices that share
an input (q, k, v; gate, up), so that one launch serves them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from guanaco.kernels.nf4 import GROUP_SIZE, NESTED_GROUP_SIZE, Nf4Weight

# `prmt` picks four of eight bytes; the top bit of a selector repeats the sign of a byte instead. The 16 levels are
# split into two tables. Entries with the same index have the same sign in both bytes, so the table that is not wanted
# gives 0x00 or 0xff; the other table is stored complemented to undo that. Multiplied by GAIN, the float16 levels form
# such pairs (and their rounding error is halved); scales are divided by GAIN. tests/support/kernels/nf4_proof.py proves
# it for all patterns.
GAIN = 1.350341796875
CODE_OF_LEVEL = (0, 2, 3, 1, 8, 10, 11, 9, 4, 5, 6, 7, 12, 14, 13, 15)
# Bytes of the float16 levels by code, four in a word: (codes 0 - 3, codes 4 - 7) and (8 - 11, 12 - 15) of the low
# bytes, then the same of the high bytes.
TABLE_WORDS = (
    0xAC854467, 0x4D51F4E1, 0x21030025, 0x6714303C,
    0xB9BBB8BD, 0x3735322E, 0x504C7F49, 0x3D3A3B38,
)  # fmt: skip
CODES_PER_WORD = 8


@dataclass(frozen=True)
class TritonNf4:
    """One matrix [n, k] of NF4 weights, or several with the same k stacked.

    A weight is float16(GAIN · level) × scale. Group b = (row · k + column) // 64 has the scale map[absmax[b]] ·
    nested[b // 256, 0] + nested[b // 256, 1]; without double quantisation it is absmax[b].
    """

    words: Tensor  # int32 [n, k / 8]: nibble i of word j is the relabelled code of column 8 · j + i
    absmax: Tensor  # uint8 [n · k / 64]; float32, divided by GAIN, without double quantisation
    nested: Tensor | None  # float32 [ceil(n · k / 64 / 256), 2]: scale and offset of 256 codes, divided by GAIN
    map: Tensor | None  # float32 [256]

    def __post_init__(self) -> None:
        assert self.words.dtype == torch.int32
        assert self.words.is_contiguous()
        num_groups = self.words.numel() * CODES_PER_WORD // GROUP_SIZE
        assert self.absmax.shape == (num_groups,), self.absmax.shape
        assert self.absmax.dtype == (torch.uint8 if self.double_quant else torch.float32)
        assert (self.nested is None) == (self.map is None)
        assert self.nested is None or self.nested.shape == (-(-num_groups // NESTED_GROUP_SIZE), 2)

    @property
    def n(self) -> int:
        return self.words.shape[0]

    @property
    def k(self) -> int:
        return self.words.shape[1] * CODES_PER_WORD

    @property
    def double_quant(self) -> bool:
        return self.nested is not None

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensors take in memory."""
        tensors = (self.words, self.absmax, self.nested, self.map)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def scales(self) -> Tensor:
        """float32 [n · k / 64], divided by GAIN."""
        if self.nested is None or self.map is None:
            return self.absmax
        pairs = self.nested.repeat_interleave(NESTED_GROUP_SIZE, dim=0)[: self.absmax.numel()]
        return self.map[self.absmax.long()] * pairs[:, 0] + pairs[:, 1]

    def to(self, device: torch.device) -> "TritonNf4":
        """The same weight on `device`."""
        nested, code_map = self.nested, self.map
        return TritonNf4(
            self.words.to(device),
            self.absmax.to(device),
            None if nested is None else nested.to(device),
            None if code_map is None else code_map.to(device),
        )


def can_pack(weight: Nf4Weight) -> bool:
    """Whether the kernels can read this weight: its rows must be whole groups. Other weights are decoded and multiplied
    as dense."""
    return weight.in_features % GROUP_SIZE == 0


def pack_nf4(weight: Nf4Weight) -> TritonNf4:
    """The weight as the kernels read it, on the same device; `can_pack` must hold."""
    assert can_pack(weight), weight.shape
    relabelled = _relabelled_bytes(weight.packed.device).index_select(0, weight.packed.to(torch.int32))
    words = relabelled.view(torch.int32).view(weight.out_features, -1)
    if weight.nested_absmax is None or weight.nested_map is None:
        return TritonNf4(words, weight.absmax / GAIN, None, None)
    offsets = torch.full_like(weight.nested_absmax, weight.nested_offset)
    nested = torch.stack((weight.nested_absmax, offsets), dim=1) / GAIN
    return TritonNf4(words, weight.absmax, nested, weight.nested_map)


def merge(parts: Sequence[TritonNf4]) -> TritonNf4:
    """The parts stacked into one weight; all have the same k.

    Scales stay double-quantised if every part is, all have the same map, and no 256 codes belong to two parts.
    Otherwise the scales are decoded and kept so (4.5 bits a weight instead of 4.13).
    """
    assert len({p.k for p in parts}) == 1, [(p.n, p.k) for p in parts]
    words = torch.cat([p.words for p in parts])
    code_map = parts[0].map
    nested = [p.nested for p in parts if p.nested is not None]
    aligned = all(p.absmax.numel() % NESTED_GROUP_SIZE == 0 for p in parts[:-1])
    same_map = code_map is not None and all(
        p.map is not None and (p.map is code_map or torch.equal(p.map, code_map)) for p in parts
    )
    if same_map and aligned:
        return TritonNf4(words, torch.cat([p.absmax for p in parts]), torch.cat(nested), code_map)
    return TritonNf4(words, torch.cat([p.scales() for p in parts]), None, None)


@lru_cache(maxsize=8)
def _relabelled_bytes(device: torch.device) -> Tensor:
    """uint8 [256]: a byte of bitsandbytes' (first weight in the high nibble) → ours (low nibble, other codes)."""
    byte = torch.arange(256, device=device)
    codes = torch.tensor(CODE_OF_LEVEL, device=device)
    return (codes[byte >> 4] | codes[byte & 0xF] << 4).to(torch.uint8)
