"""The NF4 format: levels, packing, quantising, double quantisation. Bit-identical to bitsandbytes 0.50 on the CPU.

Knows nothing of files, layers or providers. bitsandbytes itself is only used in the tests, to compare with. `nf4_state`
has the form in which a checkpoint stores these weights. Used by `models.loading`, `kernels.cpu.quantize` and the
providers.
"""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

GROUP_SIZE = 64
NESTED_GROUP_SIZE = 256
SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# QLoRA (Dettmers et al. 2023), appendix E; the float32 values that bitsandbytes checkpoints carry as `quant_map`.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

NOT_FINITE = "the matrix holds values that are not finite (NaN or infinity)"

# Whole groups per pass of quantising and decoding: 1 MiB of float32. Temporaries then stay in the caches (twice as fast
# as 4 MiB here), and the memory peak is about the tensor itself.
_CHUNK_GROUPS = 1 << 12
_NUM_CELLS = 32  # see `encode`
# bitsandbytes divides by max(absmax, this): an all-zero group takes level 7, which is 0.
_SMALLEST_ABSMAX = 1e-38
# bitsandbytes' CPU code looks the 8-bit code of a normalised scale up in a table over [-1, 1] with this many entries.
_SCALE_TABLE_SIZE = 65536


@dataclass(frozen=True)
class Nf4Weight:
    """One quantised matrix [out_features, in_features], as stored. The value of a weight is level × scale, in float32.

    Groups of 64 run over the row-major flattened matrix, so a group can cross rows if in_features is not a multiple of
    64.
    """

    packed: Tensor  # uint8 [(n·k + 1) // 2]: two codes in a byte, the first weight in the high nibble
    absmax: Tensor  # float32 [groups]; with double quantisation uint8 [groups], codes into nested_map
    shape: tuple[int, int]
    source_dtype: torch.dtype  # dtype before quantisation; not the compute dtype
    nested_absmax: Tensor | None = None  # float32 [ceil(groups / 256)]
    nested_map: Tensor | None = None  # float32 [256]
    nested_offset: float = 0.0  # a float32 value

    def __post_init__(self) -> None:
        num_weights = self.shape[0] * self.shape[1]
        assert self.packed.shape == ((num_weights + 1) // 2,), self.packed.shape
        assert self.absmax.shape == (-(-num_weights // GROUP_SIZE),), self.absmax.shape
        assert (self.nested_absmax is None) == (self.nested_map is None)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def is_double_quantized(self) -> bool:
        return self.nested_absmax is not None

    @property
    def num_bytes(self) -> int:
        """Bytes that the stored codes and scales take in memory."""
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_map)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device) -> "Nf4Weight":
        """The same weight on `device`."""
        return Nf4Weight(
            self.packed.to(device),
            self.absmax.to(device),
            self.shape,
            self.source_dtype,
            None if self.nested_absmax is None else self.nested_absmax.to(device),
            None if self.nested_map is None else self.nested_map.to(device),
            self.nested_offset,
        )

    def scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """float32 scales of groups start … stop − 1 (all by default). A decoded scale can be slightly negative.

        With double quantisation: map[code] × nested_absmax, rounded, plus the offset, rounded again.
        """
        codes = self.absmax[start:stop]
        if self.nested_absmax is None or self.nested_map is None:
            return codes
        group = torch.arange(start, start + codes.numel(), device=codes.device)
        products = self.nested_map[codes.to(torch.int32)] * self.nested_absmax[group // NESTED_GROUP_SIZE]
        return products + self.nested_offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [out_features, in_features]: level × scale in float32, then rounded once to `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        flat, total = out.view(-1), out.numel()
        step = _CHUNK_GROUPS * GROUP_SIZE
        for start in range(0, total, step):
            flat[start : start + step] = self._decode(start, min(start + step, total))
        return out

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 in float32. A group may cross into the rows before or after."""
        return self._decode(start * self.in_features, stop * self.in_features).view(-1, self.in_features)

    def _decode(self, start: int, stop: int) -> Tensor:
        """float32 [stop − start]: elements of the flattened matrix."""
        first, last = start // GROUP_SIZE, -(-stop // GROUP_SIZE)
        # Groups start on whole bytes (64 is even), so a run of whole groups is a run of whole bytes.
        packed = self.packed[first * GROUP_SIZE // 2 : last * GROUP_SIZE // 2]
        levels = _level_pairs(packed.device).index_select(0, packed.to(torch.int32)).view(torch.float32)
        num_groups = last - first
        if levels.numel() < num_groups * GROUP_SIZE:
            levels = torch.nn.functional.pad(levels, (0, num_groups * GROUP_SIZE - levels.numel()))
        weights = levels.view(num_groups, GROUP_SIZE) * self.scales(first, last).view(-1, 1)
        return weights.view(-1)[start - first * GROUP_SIZE : stop - first * GROUP_SIZE]

    def fingerprint(self) -> str:
        """Hex SHA-256 of shape, codes and decoded scales: equal weights have equal fingerprints in either form of the
        scales."""
        digest = hashlib.sha256(b"nf4" + struct.pack("<2q", *self.shape))
        digest.update(self.packed.cpu().contiguous().numpy().data)
        digest.update(self.scales().cpu().contiguous().numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()


def quantize(matrix: Tensor, *, double_quant: bool = True) -> Nf4Weight:
    """Quantise a matrix [out, in] of float32, float16 or bfloat16, any sizes.

    Raises ValueError for other dtypes or dimensions, an empty matrix, and values that are not finite.
    """
    check_matrix(matrix)
    # One thread: the rounding of a sum depends on how many threads share it, and the passes are so short that sharing
    # them is ten times slower (measured here) when another process wants the cores. One thread does about 150 million
    # weights a second; `kernels.cpu.quantize` has a native form with the same bits.
    with _one_thread():
        flat = matrix.detach().reshape(-1)
        return from_groups(*_quantize_all(flat), matrix, double_quant=double_quant)


def check_matrix(matrix: Tensor) -> None:
    """Raise ValueError unless `quantize` takes this tensor: a matrix that is not empty, in one of SOURCE_DTYPES."""
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"NF4 needs a matrix that is not empty, got shape {list(matrix.shape)}")
    if matrix.dtype not in SOURCE_DTYPES:
        raise ValueError(f"NF4 needs float32, float16 or bfloat16, got {dtype_name(matrix.dtype)}")


def from_groups(packed: Tensor, absmax: Tensor, matrix: Tensor, *, double_quant: bool) -> Nf4Weight:
    """The weight of `matrix` from its packed codes uint8 [(n·k + 1) // 2] and scales float32 [groups]."""
    shape = (matrix.shape[0], matrix.shape[1])
    if not double_quant:
        return Nf4Weight(packed, absmax, shape, matrix.dtype)
    with _one_thread():
        offset = absmax.mean()
        scale_codes, nested_absmax = quantize_scales(absmax - offset)
    return Nf4Weight(packed, scale_codes, shape, matrix.dtype, nested_absmax, dynamic_map(packed.device), offset.item())


def _quantize_all(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of all groups of values [n], a chunk at a time."""
    num_groups = -(-flat.numel() // GROUP_SIZE)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(num_groups, dtype=torch.float32, device=flat.device)
    for group in range(0, num_groups, _CHUNK_GROUPS):
        start, stop = group * GROUP_SIZE, min((group + _CHUNK_GROUPS) * GROUP_SIZE, flat.numel())
        chunk, chunk_absmax = quantize_groups(flat[start:stop])
        packed[start // 2 : (stop + 1) // 2] = chunk
        absmax[group : group + chunk_absmax.numel()] = chunk_absmax
    return packed, absmax


def quantize_groups(values: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [(n + 1) // 2] and scales float32 [groups] of consecutive values [n] in a source dtype.

    The last group may be short. Raises ValueError for values that are not finite.
    """
    values = values.float()
    tail = values.numel() % GROUP_SIZE
    whole = values[: values.numel() - tail].view(-1, GROUP_SIZE)
    absmax = whole.abs().amax(dim=1)
    if not torch.isfinite(absmax).all() or not torch.isfinite(values[values.numel() - tail :]).all():
        raise ValueError(NOT_FINITE)
    # bitsandbytes multiplies whole groups by the reciprocal, but divides a short last one; both are kept.
    normal = (whole * absmax.clamp(min=_SMALLEST_ABSMAX).reciprocal().view(-1, 1)).view(-1)
    if tail:
        last = values[values.numel() - tail :]
        last_absmax = last.abs().amax().clamp(min=_SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last_absmax.view(1)])
        normal = torch.cat([normal, last / last_absmax])
    return pack(encode(normal.clamp_(-1.0, 1.0))), absmax


def encode(normal: Tensor) -> Tensor:
    """Codes uint8 [n] of the levels nearest to float32 [n] in [-1, 1]. Half way between two levels: the lower level.

    [-1, 1] is cut into equal cells, each with at most one threshold between two levels. So one look-up and one
    comparison replace a binary search and are five times as fast. The cell number never falls as the value grows, so
    rounding it can't change the result.
    """
    lowest, threshold = _cells(normal.device)
    cell = _cell(normal)
    return lowest.index_select(0, cell) + (normal > threshold.index_select(0, cell))


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """(8-bit codes uint8 [groups], nested absmax float32 [ceil(groups / 256)]) of centred scales float32 [groups]."""
    num_nested = -(-scales.numel() // NESTED_GROUP_SIZE)
    padded = torch.nn.functional.pad(scales, (0, num_nested * NESTED_GROUP_SIZE - scales.numel()))
    groups = padded.view(num_nested, NESTED_GROUP_SIZE)
    absmax = groups.abs().amax(dim=1)
    # 0 · ∞ appears if all scales of a group (nearly) equal the mean; bitsandbytes writes the first code for it.
    normal = torch.nan_to_num(groups * absmax.reciprocal().view(-1, 1), nan=-1.0).clamp(-1.0, 1.0)
    # Whether the last product and sum are fused, as in bitsandbytes' binary, changes no index (all 2^25 values tried).
    index = ((normal + 1.0) * 0.5 * (_SCALE_TABLE_SIZE - 1) + 0.5).to(torch.int32)
    return _scale_table(scales.device)[index].view(-1)[: scales.numel()].contiguous(), absmax


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes in each byte, the first in the high nibble. An odd number of codes is filled up with code 7, the
    level 0."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: Tensor, num_codes: int) -> Tensor:
    """uint8 [num_codes], the inverse of `pack`."""
    return torch.stack((packed >> 4, packed & 0xF), dim=1).view(-1)[:num_codes]


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=8)
def levels(device: torch.device) -> Tensor:
    """The 16 NF4 levels, float32 [16]."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def dynamic_map(device: torch.device) -> Tensor:
    """float32 [256], ascending: the signed dynamic 8-bit data type (Dettmers, arXiv:1511.04561) that encodes scales.

    The positive and the negative numbers have seven decades each. Decade e has 2^e values: the middles of equal steps
    from 0.1 to 1, times 10^(e − 6). 0 and 1 complete the 256.
    """
    magnitudes = []
    for decade in range(7):
        edges = _fused_linspace(2**decade)
        magnitudes.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (decade - 6))
    positive = torch.cat(magnitudes)
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values.to(device)


def _fused_linspace(num_steps: int) -> Tensor:
    """torch.linspace(0.1, 1, num_steps + 1) in float32, as a fused multiply-add computes it.

    A CPU or a build of torch without that instruction rounds twice; float64 makes the table the same everywhere.
    """
    start, end = torch.tensor([0.1, 1.0], dtype=torch.float32)
    step = ((end - start) / num_steps).double()
    index = torch.arange(num_steps + 1, dtype=torch.float64)
    from_start, from_end = start + step * index, end - step * (num_steps - index)
    return torch.where(index < (num_steps + 1) // 2, from_start, from_end).to(torch.float32)


def _cell(normal: Tensor) -> Tensor:
    """int32 [n]: the number of each value's cell (a thirty-second of [-1, 1])."""
    return ((normal + 1.0) * (_NUM_CELLS / 2)).to(torch.int32)


@lru_cache(maxsize=8)
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell: the code at its lower end (uint8), and the threshold inside it (2 if it has none)."""
    table = levels(torch.device("cpu"))
    thresholds = (table[:-1] + table[1:]) / 2.0  # in float32, as bitsandbytes has them
    cells = _cell(thresholds).tolist()
    assert len(set(cells)) == len(cells), "two thresholds in one cell"
    lowest = torch.tensor([sum(c < cell for c in cells) for cell in range(_NUM_CELLS + 1)], dtype=torch.uint8)
    inside = torch.full((_NUM_CELLS + 1,), 2.0)
    inside[cells] = thresholds
    return lowest.to(device), inside.to(device)


@lru_cache(maxsize=8)
def _level_pairs(device: torch.device) -> Tensor:
    """int64 [256]: the bits of the two float32 levels of every byte, so that one look-up fetches both."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    table = levels(device)
    return torch.stack((table[byte >> 4], table[byte & 0xF]), dim=1).view(torch.int64).view(-1)


@lru_cache(maxsize=8)
def _scale_table(device: torch.device) -> Tensor:
    """uint8 [65536]: the nearest entry of `dynamic_map` for each step of [-1, 1]."""
    code = dynamic_map(device)
    steps = torch.arange(_SCALE_TABLE_SIZE, dtype=torch.float32, device=device) * 2.0 / (_SCALE_TABLE_SIZE - 1) - 1.0
    return torch.bucketize(steps, (code[:-1] + code[1:]) * 0.5, out_int32=True).to(torch.uint8)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread, and restore the caller's number of threads afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
