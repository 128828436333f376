"""The tensors behind the slot table: each adapter slot's A and B on the device, exact to the rank.

No policy: it copies what it is told to, between steps, on the engine thread. On the CPU nothing is copied at all: the
slots hold the host tensors of the adapter, which never change. Called by the model runner.
"""

from collections.abc import Callable, Sequence

import torch

from guanaco.adapters.weights import LoadedAdapter
from guanaco.kernels.lora_batch import LoraPair, LoraTable


class SlotStore:
    """`num_slots` places for adapters of one base model; `table` is what the ops read."""

    def __init__(
        self,
        targets: dict[str, tuple[int, int]],
        num_slots: int,
        device: torch.device,
        place: Callable[[Sequence[LoraPair]], list[LoraPair]] | None = None,
    ) -> None:
        """place: copies all pairs of one adapter to the device, as `Ops.place_adapter` does; none: as they are."""
        self.num_slots = num_slots
        self._modules = {target: module for module, target in enumerate(targets)}
        self._device = device
        self._place = place or self._copy
        self._table = LoraTable(pairs={})
        self._keys: dict[int, list[tuple[int, int]]] = {}  # slot → its keys in the table

    @property
    def table(self) -> LoraTable:
        """The table of all slots, keyed (module, slot). The same object always: a batch may keep it for its step."""
        return self._table

    @property
    def num_bytes(self) -> int:
        """Bytes of all matrices in the slots; on the CPU they are the host copies' own."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in list(self._table.pairs.values()))

    def load(self, slot: int, adapter: LoadedAdapter) -> None:
        """Put `adapter` into `slot`, in place of whatever was there.

        If the device runs out of memory, the slot is left empty and the error passes on.
        """
        self.clear(slot)
        placed = self._place(list(adapter.pairs.values()))
        keys = [(self._modules[target], slot) for target in adapter.pairs]
        self._table.pairs.update(zip(keys, placed, strict=True))
        self._table.changes += 1
        self._keys[slot] = keys

    def clear(self, slot: int) -> None:
        """Empty `slot`; its memory goes back to the device's allocator."""
        assert 0 <= slot < self.num_slots, f"no adapter slot {slot}"
        for key in self._keys.pop(slot, []):
            del self._table.pairs[key]
        self._table.changes += 1

    def _copy(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        return [LoraPair(pair.a.to(self._device), pair.b.to(self._device), pair.scale) for pair in pairs]
