"""LoRA operands as the native kernels read them: a table of pointers per (module, slot), and rows sorted by slot.

Building a table takes thousands of look-ups, so a slot's column is kept until the slot's matrices change. Knows no
adapter names. Used by `kernels.cpu.ops`.
"""

from collections.abc import Iterable

import numpy as np
import torch

from guanaco.kernels.cpu import library as native
from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable

DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}
_PAIR = np.dtype(native.LoraPair)


class LoraOperand:
    """A `native.Lora` and the arrays that it points into."""

    def __init__(self, batch: LoraBatch, columns: list["np.ndarray"]) -> None:
        """columns: a `_PAIR` array [modules] for each slot of `batch.rows_by_slot`, in the same order."""
        groups = batch.rows_by_slot
        rows = [rows for rows, _ in groups.values()]
        self._rows = torch.cat(rows).to(torch.int32)
        self._scales = torch.cat([scales for _, scales in groups.values()])
        counts = torch.tensor([len(r) for r in rows])
        self._slots = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(counts)
        self._pairs = np.stack(columns, axis=1)
        self.struct = native.Lora(
            rows=self._rows.data_ptr(),
            slots=self._slots.data_ptr(),
            scales=self._scales.data_ptr(),
            pairs=self._pairs.ctypes.data,
            num_entries=self._rows.numel(),
            num_slots=len(rows),
        )


class LoraOperands:
    """Makes a `LoraOperand` for each step and keeps the parts that don't change between steps."""

    def __init__(self) -> None:
        self._columns: dict[int, tuple[list[LoraPair | None], np.ndarray]] = {}

    def operand(self, batch: LoraBatch, modules: Iterable[int]) -> LoraOperand | None:
        """The operand of `batch` for these modules; None if no row has an adapter."""
        if not batch.rows_by_slot:
            return None
        modules = list(modules)
        return LoraOperand(batch, [self._column(batch.table, slot, modules) for slot in batch.rows_by_slot])

    def _column(self, table: LoraTable, slot: int, modules: list[int]) -> "np.ndarray":
        pairs = [table.pairs.get((module, slot)) for module in modules]
        known = self._columns.get(slot)
        # `is` compares addresses. We hold the remembered pairs, so no new pair can have the address of one of them.
        if known is not None and len(known[0]) == len(pairs) and all(map(_is, known[0], pairs)):
            return known[1]
        column = np.zeros(len(pairs), dtype=_PAIR)
        for i, pair in enumerate(pairs):
            if pair is not None:
                column[i] = _entry(pair)
        self._columns[slot] = (pairs, column)
        return column


def _is(a: object, b: object) -> bool:
    return a is b


def _entry(pair: LoraPair) -> tuple[int, int, int, int, float, int]:
    for matrix in (pair.a, pair.b):
        assert matrix.is_contiguous() and matrix.device.type == "cpu", "a LoRA matrix that is not plain host memory"
    assert pair.a.dtype == pair.b.dtype and pair.a.shape[0] == pair.b.shape[1], (pair.a.shape, pair.b.shape)
    return pair.a.data_ptr(), pair.b.data_ptr(), pair.a.shape[0], DTYPES[pair.a.dtype], pair.scale, 0
