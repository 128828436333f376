"""The LoRA operand of every linear op: which adapters each row of a batch uses, and where their matrices are.

Knows nothing of adapter names, versions or files: an adapter is a place on the device ("adapter slot"), a module is an
index. `adapters.residency.slot_store` builds the table, the model runner builds the rows, and the providers read both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraPair:
    """One module of one adapter: delta(x) = scale · B (A x), computed in fp32 whatever the stored dtype."""

    a: Tensor  # [rank, in_features]   float32, float16 or bfloat16, as the adapter's file has it
    b: Tensor  # [out_features, rank]  same dtype
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rsLoRA; never folded into B


@dataclass(eq=False)
class LoraTable:
    """The contents of the adapter slots: `pairs[module, slot]`. Without such a key the slot's adapter leaves the module
    unchanged."""

    pairs: dict[tuple[int, int], LoraPair]
    changes: int = 0  # incremented with every change of `pairs`, so that a provider need not compare them in every step


@dataclass(frozen=True)
class LoraBatch:
    """The rows of one forward pass and their adapters, in CSR form. A row may use several adapters, one, or none.

    The entries of row `i` are `row_offsets[i] : row_offsets[i + 1]`. A row without entries is a base row: its output
    must be bit-identical to its output in a batch of the same shape without adapters.
    """

    row_offsets: Tensor  # int32 [rows + 1]
    slots: Tensor  # int32 [entries]     adapter slot of each entry
    scales: Tensor  # float32 [entries]: the request's own factor (1.0 unless it asks for weighted adapters)
    table: LoraTable
    rows_by_slot: dict[int, tuple[Tensor, Tensor]]  # slot → (int64 [n] rows, float32 [n] scales): the grouped view

    @staticmethod
    def build(row_adapters: list[tuple[tuple[int, float], ...]], table: LoraTable, device: torch.device) -> "LoraBatch":
        """Group rows by slot. `row_adapters[i]` lists row i's (adapter slot, scale) entries, none for a base row."""
        offsets, slots, scales = [0], [], []
        grouped: dict[int, tuple[list[int], list[float]]] = {}
        for row, entries in enumerate(row_adapters):
            for slot, scale in entries:
                slots.append(slot)
                scales.append(scale)
                rows, factors = grouped.setdefault(slot, ([], []))
                rows.append(row)
                factors.append(scale)
            offsets.append(len(slots))
        return LoraBatch(
            row_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int32, device=device),
            scales=torch.tensor(scales, dtype=torch.float32, device=device),
            table=table,
            rows_by_slot={
                slot: (
                    torch.tensor(rows, dtype=torch.int64, device=device),
                    torch.tensor(factors, dtype=torch.float32, device=device),
                )
                for slot, (rows, factors) in sorted(grouped.items())
            },
        )
