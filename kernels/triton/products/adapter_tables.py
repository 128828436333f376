"""LoRA operands as the Triton kernels read them: tables of addresses per (module, slot), and rows as factors per slot.

A slot's columns of the tables are written when the slot changes, not in every step. The kernels read float16: matrices
of other dtypes are divided by a power of two that brings their largest element near 1, and the scale is multiplied by
it. Used by `kernels.triton.ops`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable
from guanaco.kernels.triton.pinned import PinnedCopier
from guanaco.kernels.triton.products.lora import TritonLora, rank_bucket

# Matrices begin at multiples of this many bytes, and so do their rows if the rank is a multiple of the same number of
# elements. The kernels' widest loads need that.
_ALIGNMENT, _ALIGNED_RANK = 16, 8


class AdapterTables:
    """The contents of the adapter slots, by address: four tensors [modules, slots] that are written in place.

    The tensors only move to other memory if a module or slot beyond their size appears, so reserve what a CUDA graph
    will read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # slot → (module, the pair as given, the pair as the kernels read it)
        self._columns: dict[int, list[tuple[int, LoraPair, LoraPair]]] = {}
        self._ranks: dict[int, tuple[int, bool]] = {}  # slot → (its largest rank, whether all its matrices are aligned)
        self._seen: tuple[LoraTable | None, int] = (None, -1)
        self._checked: set[int] = set()  # slots compared since the table last changed
        self._allocate(0, 0)

    def _allocate(self, num_modules: int, num_slots: int) -> None:
        shape = (num_modules, num_slots)
        self.a_ptr, self.b_ptr = (torch.zeros(shape, dtype=torch.int64, device=self._device) for _ in range(2))
        self.rank = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self.scale = torch.zeros(shape, dtype=torch.float32, device=self._device)

    def reserve(self, num_modules: int, num_slots: int) -> None:
        """Make room for this many modules and slots. Existing contents are written again."""
        modules, slots = self.rank.shape
        if num_modules <= modules and num_slots <= slots:
            return
        self._allocate(max(modules, num_modules), max(slots, num_slots))
        for slot in self._columns:
            self._write(slot)

    def refresh(self, table: LoraTable, slots: Sequence[int]) -> tuple[int, bool]:
        """Bring the columns of `slots` up to date. Returns (the largest rank among them, whether all are aligned)."""
        if self._seen[0] is not table or self._seen[1] != table.changes:
            self._seen, self._checked = (table, table.changes), set()
        for slot in slots:
            if slot not in self._checked:
                self._compare(table, slot)
                self._checked.add(slot)
        found = [self._ranks[slot] for slot in slots]
        return max((rank for rank, _ in found), default=0), all(aligned for _, aligned in found)

    def _compare(self, table: LoraTable, slot: int) -> None:
        pairs = [(module, pair) for (module, in_slot), pair in table.pairs.items() if in_slot == slot]
        known = self._columns.get(slot)
        # We hold the remembered pairs, so no new pair can have the memory address of one of them.
        if known is not None and [(m, id(p)) for m, p in pairs] == [(m, id(p)) for m, p, _ in known]:
            return
        self._columns[slot] = [(module, pair, half_pair(pair, self._device)) for module, pair in pairs]
        halves = [half for _, _, half in self._columns[slot]]
        self._ranks[slot] = (
            max((half.a.shape[0] for half in halves), default=0),
            all(_is_aligned(half) for half in halves),
        )
        self.reserve(max((module for module, _ in pairs), default=-1) + 1, slot + 1)
        self._write(slot)

    def _write(self, slot: int) -> None:
        shape = (self.rank.shape[0],)
        a_ptr, b_ptr = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        rank, scale = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.float32)
        for module, _, pair in self._columns[slot]:
            a_ptr[module], b_ptr[module] = pair.a.data_ptr(), pair.b.data_ptr()
            rank[module], scale[module] = pair.a.shape[0], pair.scale
        for table, column in ((self.a_ptr, a_ptr), (self.b_ptr, b_ptr), (self.rank, rank), (self.scale, scale)):
            table[:, slot] = column.to(self._device)

    def operand(self, batch: LoraBatch, num_rows: int) -> TritonLora | None:
        """The operand of a batch; None if no row has an adapter."""
        slots = list(batch.rows_by_slot)
        if not slots:
            return None
        max_rank, aligned = self.refresh(batch.table, slots)
        if max_rank == 0:
            return None
        # A kernel is compiled for a number of adapters. With the number rounded up to a power of two, few batches have
        # to wait for a compilation.
        room = 1 << (len(slots) - 1).bit_length()
        factors = torch.zeros((room, num_rows), dtype=torch.float32, device=self._device)
        for column, (rows, scales) in zip(factors, batch.rows_by_slot.values(), strict=False):
            column.index_add_(0, rows, scales)
        active = torch.tensor(slots + [-1] * (room - len(slots)), dtype=torch.int32, device=self._device)
        return self.over(active, factors, rank_bucket(max_rank), aligned)

    def over(self, active_slots: Tensor, factors: Tensor, max_rank: int, aligned: bool) -> TritonLora:
        """The operand over the given tensors: slots int32 [active] (−1: unused), factors float32 [active, rows]."""
        return TritonLora(
            a_ptr=self.a_ptr,
            b_ptr=self.b_ptr,
            rank=self.rank,
            scale=self.scale,
            active_slots=active_slots,
            factors=factors,
            max_rank=max_rank,
            rows=factors.shape[1],
            aligned=aligned,
        )


def _is_aligned(pair: LoraPair) -> bool:
    return pair.a.shape[0] % _ALIGNED_RANK == 0 and all(m.data_ptr() % _ALIGNMENT == 0 for m in (pair.a, pair.b))


def half_pair(pair: LoraPair, device: torch.device) -> LoraPair:
    """The pair in float16 on `device`; the same object if nothing has to change. Only pairs that are not float16 yet,
    or are moved, are scaled (see `_normalised`)."""
    is_half = pair.a.dtype == pair.b.dtype == torch.float16 and pair.a.is_contiguous() and pair.b.is_contiguous()
    if is_half and pair.a.device == device:
        return pair
    a, a_power = _normalised(pair.a)
    b, b_power = _normalised(pair.b)
    return LoraPair(a.half().to(device), b.half().to(device), pair.scale * 2.0 ** (a_power + b_power))


def _normalised(matrix: Tensor) -> tuple[Tensor, int]:
    """(matrix · 2^−power as contiguous float32, power). The largest element is at least 1/2 and below 1.

    float16 keeps 11 bits of numbers above 2^−14. Adapters have elements below that, and some have elements above
    65,504.
    """
    matrix = matrix.float().contiguous()
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    power = math.frexp(largest)[1] if 0.0 < largest < math.inf else 0
    return matrix * 2.0**-power, power


def place_adapter(pairs: Sequence[LoraPair], device: torch.device, copier: PinnedCopier | None) -> list[LoraPair]:
    """All pairs of one adapter in float16, in one block of memory on `device`.

    copier: copies the block on a stream of its own. None: copy on the current stream.
    """
    halves = [half_pair(pair, torch.device("cpu")) for pair in pairs]
    matrices = [matrix for pair in halves for matrix in (pair.a, pair.b)]
    starts, end = [], 0
    for matrix in matrices:
        starts.append(end)
        end += -(-matrix.nbytes // _ALIGNMENT) * _ALIGNMENT

    def fill(host: Tensor) -> None:
        for matrix, start in zip(matrices, starts, strict=True):
            host[start : start + matrix.nbytes].view(torch.float16).copy_(matrix.flatten())

    if copier is not None:
        block = copier.copy(end, fill)
    else:
        host = torch.empty(end, dtype=torch.uint8)
        fill(host)
        block = host.to(device)
    placed = [
        block[start : start + matrix.nbytes].view(torch.float16).view(matrix.shape)
        for matrix, start in zip(matrices, starts, strict=True)
    ]
    return [LoraPair(a, b, pair.scale) for a, b, pair in zip(placed[::2], placed[1::2], halves, strict=True)]
