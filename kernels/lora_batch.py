"""The LoRA operand of every linear op: which adapters each row of a batch uses, and where their matrices are.

Knows nothing of adapter names, versions or files: an adapter is a place on the device ("adapter slot"), a module is
an index. Built by `adapters.slot_store` (the table) and the model runner (the rows); eaten by the `Ops` providers.
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
    """What is in the adapter slots: `pairs[module, slot]`; an adapter without a key there leaves the module alone."""

    pairs: dict[tuple[int, int], LoraPair]
    changes: int = 0  # counted up by whoever changes `pairs`, so that a provider need not compare them in every step


@dataclass(frozen=True)
class LoraBatch:
    """Rows of one forward pass and their adapters, as CSR: several adapters per row are possible, none is common.

    Entries of row `i` are `row_offsets[i] : row_offsets[i + 1]`. A row without entries is a base row: its output must
    be bit-identical to that of a batch without adapters of the same shape.
    """

    row_offsets: Tensor  # int32 [rows + 1]
    slots: Tensor  # int32 [entries]     adapter slot of each entry
    scales: Tensor  # float32 [entries]  the request's own factor (1.0 unless it asks for a mixture)
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
