"""The tensors behind the slot table: the A and B of each adapter slot on the device, with the adapter's own rank.

It makes no decisions: the engine's thread tells it between steps what to copy. On a CPU nothing is copied: the slots
hold the host tensors of the adapter, which never change. Other devices have an arena of bytes, and the ledger decides
where in it each adapter lies. Kernels may keep the addresses as long as a sequence holds the adapter. Called by the
model runner.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from guanaco.adapters.peft.weights import LoadedAdapter
from guanaco.kernels.lora_batch import LoraPair, LoraTable

ALIGNMENT = 256  # bytes: each matrix in the arena begins at a multiple; enough for the widest loads of any kernel


class SlotStore:
    """`num_slots` places for adapters of one base model; `table` is what the ops read."""

    def __init__(
        self,
        targets: dict[str, tuple[int, int]],
        num_slots: int,
        device: torch.device,
        place: Callable[[Sequence[LoraPair]], list[LoraPair]] | None = None,
        *,
        arena_bytes: int = 0,
        offset_of: Callable[[str], int] = lambda _: 0,
        element_bytes: int | None = None,
    ) -> None:
        """targets: the modules that adapters may change, in the order of the table's keys.

        place: copies all pairs of one adapter to the device, as `Ops.place_adapter` does. None: they are copied as they
        are. arena_bytes: allocated at once, for all adapters. 0: there is no arena, and pairs stay where `place` put
        them. offset_of: the byte offset of a version in the arena (`SlotTable.offset_of`). element_bytes: bytes per
        element of the matrices that `place` makes. None: it keeps their dtype.
        """
        self.num_slots = num_slots
        self._modules = {target: module for module, target in enumerate(targets)}
        self._device = device
        self._place = place or self._copy
        self._arena = torch.empty(arena_bytes, dtype=torch.uint8, device=device) if arena_bytes else None
        self._offset_of = offset_of
        self._element_bytes = element_bytes
        self._table = LoraTable(pairs={})
        self._keys: dict[int, list[tuple[int, int]]] = {}  # slot → its keys in the table

    def bytes_of(self, adapter: LoadedAdapter) -> int:
        """How many bytes of the arena an adapter takes; 0 if there is no arena."""
        if self._arena is None:
            return 0
        width = self._element_bytes
        matrices = _matrices(adapter.pairs.values())
        return sum(_aligned(matrix.numel() * (width or matrix.element_size())) for matrix in matrices)

    @property
    def table(self) -> LoraTable:
        """The table of all slots, keyed by (module, slot). Always the same object: a batch may keep it for its step."""
        return self._table

    @property
    def num_bytes(self) -> int:
        """Bytes of all matrices in the slots; on the CPU they are the host copies' own."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in list(self._table.pairs.values()))

    def load(self, slot: int, adapter: LoadedAdapter) -> None:
        """Put `adapter` into `slot`, replacing its content.

        If the device runs out of memory, the slot stays empty and the error is raised.
        """
        self.clear(slot)
        placed = self._place(list(adapter.pairs.values()))
        if self._arena is not None:
            taken = sum(_aligned(matrix.nbytes) for matrix in _matrices(placed))
            assert taken == self.bytes_of(adapter), "the ledger was told of other sizes"
            placed = self._into_arena(placed, self._arena, self._offset_of(adapter.version))
        keys = [(self._modules[target], slot) for target in adapter.pairs]
        self._table.pairs.update(zip(keys, placed, strict=True))
        self._table.changes += 1
        self._keys[slot] = keys

    def clear(self, slot: int) -> None:
        """Empty `slot`. Without an arena, this frees its tensors; the arena keeps its memory for other adapters."""
        assert 0 <= slot < self.num_slots, f"no adapter slot {slot}"
        for key in self._keys.pop(slot, []):
            del self._table.pairs[key]
        self._table.changes += 1

    def _into_arena(self, pairs: Sequence[LoraPair], arena: Tensor, offset: int) -> list[LoraPair]:
        """Copy the pairs into the arena, one after the other from `offset` (bytes) on, each matrix contiguous."""
        views = []
        for matrix in _matrices(pairs):
            view = arena[offset : offset + matrix.nbytes].view(matrix.dtype).view(matrix.shape)
            view.copy_(matrix)
            views.append(view)
            offset += _aligned(matrix.nbytes)
        return [LoraPair(a, b, pair.scale) for a, b, pair in zip(views[::2], views[1::2], pairs, strict=True)]

    def _copy(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        return [LoraPair(pair.a.to(self._device), pair.b.to(self._device), pair.scale) for pair in pairs]


def _matrices(pairs: Iterable[LoraPair]) -> Iterator[Tensor]:
    for pair in pairs:
        yield pair.a
        yield pair.b


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
