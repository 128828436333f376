"""Random adapters as the Triton kernels take them, and the float64 deltas that they must add.

Matrices lie in NaN-filled memory of their own, so that a read beyond the exact rank shows. Used by the tests of the
LoRA kernels and of the products that expand in their epilogues.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from guanaco.kernels.triton.products.lora import TritonLora, rank_bucket

NAN = float("nan")


@dataclass
class LoraCase:
    """Adapters for one set of modules that share an input of `k` columns; `matrices[module][slot]` is (a, b, scale)."""

    lora: TritonLora
    matrices: list[dict[int, tuple[Tensor, Tensor, float]]]
    keep: list[Tensor]  # what the tables point into

    def delta(self, x: Tensor, module: int) -> Tensor:
        """float64 [rows, n] of x float64 [rows, k]."""
        out = torch.zeros(x.shape[0], next(iter(self.matrices[module].values()))[1].shape[0], dtype=torch.float64)
        for index, slot in enumerate(self.lora.active_slots.tolist()):
            if slot in self.matrices[module]:
                a, b, scale = self.matrices[module][slot]
                factors = self.lora.factors[index].double()
                delta = (x @ a.double().T @ b.double().T) * scale * factors[:, None]
                out += torch.where((factors != 0)[:, None], delta, 0.0)
        return out


def _walled(matrix: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The matrix as a view into NaN-filled memory that starts `offset` elements off a multiple of 16 bytes."""
    wall = 64
    memory = torch.full((matrix.numel() + 2 * wall,), NAN, dtype=torch.float16)
    start = wall + (-memory.data_ptr() // 2) % 8 + offset
    view = memory[start : start + matrix.numel()].view(matrix.shape)
    view.copy_(matrix)
    return memory, view


def make_lora(
    rows: int,
    k: int,
    outs: list[int],
    ranks: list[int],
    *,
    row_slots: list[list[int]] | None = None,
    padding: int = 0,
    seed: int = 0,
    missing: set[tuple[int, int]] = frozenset(),  # type: ignore[assignment]
    aligned: bool = False,
    first_module: int = 0,
) -> LoraCase:
    """Adapter i has ranks[i] in slot 2 · i + 1; row m uses those that row_slots[m] indexes (default: m modulo).

    outs: outputs of each module from first_module on. padding: places in the active list that stay empty. missing:
    (module, adapter index) pairs that an adapter leaves alone.
    """
    generator = torch.Generator().manual_seed(seed)
    num_slots, modules = 2 * len(ranks) + 2, first_module + len(outs)
    tables = {name: torch.zeros(modules, num_slots, dtype=torch.int64) for name in ("a", "b")}
    rank_table = torch.zeros(modules, num_slots, dtype=torch.int32)
    scale_table = torch.full((modules, num_slots), NAN)
    matrices: list[dict[int, tuple[Tensor, Tensor, float]]] = [{} for _ in range(modules)]
    keep: list[Tensor] = []
    for module, out in enumerate(outs, start=first_module):
        for i, rank in enumerate(ranks):
            if (module, i) in missing:
                continue
            slot, scale = 2 * i + 1, 0.5 + 0.25 * i
            pair = []
            for shape, name in (((rank, k), "a"), ((out, rank), "b")):
                matrix = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                memory, view = _walled(matrix, offset=0 if aligned else 1)
                keep.append(memory)
                tables[name][module, slot] = view.data_ptr()
                pair.append(view)
            rank_table[module, slot], scale_table[module, slot] = rank, scale
            matrices[module][slot] = (pair[0], pair[1], scale)
    active = torch.full((len(ranks) + padding,), -1, dtype=torch.int32)
    active[: len(ranks)] = torch.arange(len(ranks), dtype=torch.int32) * 2 + 1
    factors = torch.zeros(len(active), rows)
    uses = row_slots if row_slots is not None else [[m % len(ranks)] for m in range(rows)]
    for m, mine in enumerate(uses):
        for i in mine:
            factors[i, m] = 1.0 if (i + m) % 2 else 0.75
    lora = TritonLora(
        tables["a"], tables["b"], rank_table, scale_table, active, factors,
        max_rank=rank_bucket(max(ranks)), rows=rows, aligned=aligned,
    )  # fmt: skip
    return LoraCase(lora, matrices, keep)
