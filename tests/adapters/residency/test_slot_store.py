"""What the ops find in the adapter slots after any order of loads."""

import random

import pytest
import torch

from guanaco.adapters.peft.weights import load_adapter
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.kernels.lora_batch import LoraPair
from support.adapters.tiny_adapters import make_adapter

TARGETS = {"layers.0.self_attn.q_proj": (8, 8), "layers.0.mlp.up_proj": (8, 24), "layers.1.mlp.up_proj": (8, 24)}
MODULES = list(TARGETS)
WIDE = {"layers.0.self_attn.q_proj": (64, 64), "layers.0.mlp.up_proj": (64, 128)}


@pytest.fixture
def adapters(tmp_path):
    modules = [["q_proj", "up_proj"], ["q_proj"], ["up_proj"], ["up_proj", "q_proj"]]
    return [
        load_adapter(make_adapter(tmp_path / str(i), TARGETS, 2 + i, seed=i, modules=modules[i]), TARGETS)
        for i in range(4)
    ]


def expected_pairs(slots):
    return {
        (MODULES.index(target), slot): pair for slot, adapter in slots.items() for target, pair in adapter.pairs.items()
    }


def check(store, slots):
    expected = expected_pairs(slots)
    assert store.table.pairs.keys() == expected.keys()
    for key, pair in store.table.pairs.items():
        assert torch.equal(pair.a, expected[key].a)
        assert torch.equal(pair.b, expected[key].b)
        assert pair.scale == expected[key].scale
    assert store.num_bytes == sum(adapter.num_bytes for adapter in slots.values())


def test_any_order_of_loads(adapters):
    store, slots = SlotStore(TARGETS, 3, torch.device("cpu")), {}
    table = store.table
    draw = random.Random(0)
    for _ in range(200):
        slot = draw.randrange(3)
        if draw.random() < 0.3:
            store.clear(slot)
            slots.pop(slot, None)
        else:
            slots[slot] = draw.choice(adapters)
            store.load(slot, slots[slot])
        check(store, slots)
    assert store.table is table


def test_on_the_cpu_nothing_is_copied(adapters):
    store = SlotStore(TARGETS, 2, torch.device("cpu"))
    store.load(1, adapters[0])
    host = adapters[0].pairs[MODULES[0]]
    assert store.table.pairs[0, 1].a.data_ptr() == host.a.data_ptr()


def test_another_device_gets_its_own_tensors(adapters):
    store = SlotStore(TARGETS, 2, torch.device("meta"))
    store.load(0, adapters[0])
    assert {pair.a.device.type for pair in store.table.pairs.values()} == {"meta"}
    assert store.num_bytes == adapters[0].num_bytes


def test_a_load_that_fails_leaves_the_slot_empty(adapters, monkeypatch):
    store = SlotStore(TARGETS, 2, torch.device("cpu"))
    store.load(0, adapters[0])
    store.load(1, adapters[1])
    calls = []

    def fail_late(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return self

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            store.load(0, adapters[3])
    check(store, {1: adapters[1]})


class Arena:
    """A store with an arena in the host's memory, and the ledger that says where in it everything lies."""

    def __init__(self, num_slots, num_bytes, place=None, element_bytes=None):
        self.table = SlotTable(num_slots, num_bytes)
        self.store = SlotStore(
            TARGETS,
            num_slots,
            torch.device("cpu"),
            place,
            arena_bytes=num_bytes,
            offset_of=self.table.offset_of,
            element_bytes=element_bytes,
        )
        self.adapters = {}

    def pin(self, *adapters):
        for adapter in adapters:
            if adapter.version not in self.adapters:
                self.adapters[adapter.version] = adapter
                self.table.set_size(adapter.version, self.store.bytes_of(adapter))
        plan = self.table.pin(adapter.version for adapter in adapters)
        for slot, _ in self.table.take_clears():
            self.store.clear(slot)
        for slot, version in self.table.take_loads():
            self.store.load(slot, self.adapters[version])
        return plan is not None

    def unpin(self, *adapters):
        self.table.unpin(adapter.version for adapter in adapters)

    def resident(self):
        return {slot: self.adapters[version] for version, slot in self.table.resident.items()}


def test_an_arena_holds_what_the_ledger_says(adapters):
    """Any order of pins, with too few bytes for all: whoever is resident has its own matrices, and who is held keeps
    its addresses."""
    arena, draw, held, addresses = Arena(4, 4096), random.Random(1), [], {}
    assert sum(arena.store.bytes_of(adapter) for adapter in adapters) > 4096
    refused = 0
    for _ in range(300):
        if held and draw.random() < 0.5:
            arena.unpin(held.pop(draw.randrange(len(held))))
        elif arena.pin(adapter := draw.choice(adapters)):
            held.append(adapter)
        else:
            refused += 1
        check(arena.store, arena.resident())
        found = {
            (slot, module): pair.a.data_ptr()
            for (module, slot), pair in arena.store.table.pairs.items()
            if arena.resident()[slot] in held
        }
        assert all(addresses.get(key, address) == address for key, address in found.items())
        addresses = found
        assert all(pair.a.data_ptr() % 16 == 0 for pair in arena.store.table.pairs.values())
    assert refused
    assert arena.table.num_evictions > 10


def test_sixty_four_adapters_of_rank_8_take_64_times_rank_8(tmp_path):
    """… and not 64 times rank 128, as where each place is made for the largest."""
    adapters = [load_adapter(make_adapter(tmp_path / str(rank), WIDE, rank, seed=rank), WIDE) for rank in (8, 128)]
    small, large = (SlotStore(WIDE, 1, torch.device("cpu"), arena_bytes=1).bytes_of(adapter) for adapter in adapters)
    assert (small, large) == (adapters[0].num_bytes, adapters[1].num_bytes), "nothing is lost to alignment"
    assert large == 16 * small
    table = SlotTable(65, 64 * small)
    for number in range(64):
        table.set_size(f"v{number}", small)
    table.set_size("large", large)
    assert table.pin(f"v{number}" for number in range(64)) is not None
    assert table.used_bytes == table.num_bytes == 4 * large
    assert table.pin(["large"]) is None
    table.unpin(f"v{number}" for number in range(64))
    assert len(table.pin(["large"]).evicted) == 16


def test_matrices_of_another_width_are_counted_as_they_will_lie(adapters):
    """A provider that keeps float16: half the bytes."""

    def half(pairs):
        return [LoraPair(pair.a.half(), pair.b.half(), pair.scale) for pair in pairs]

    adapter = adapters[3]  # of rank 5: large enough for alignment not to hide the difference
    arena, wrong = Arena(2, 4096, half, element_bytes=2), Arena(2, 4096, half)
    assert arena.store.bytes_of(adapter) < wrong.store.bytes_of(adapter)
    assert arena.pin(adapter)
    for (module, _), placed in arena.store.table.pairs.items():
        pair = adapter.pairs[MODULES[module]]
        assert torch.equal(placed.a, pair.a.half())
        assert torch.equal(placed.b, pair.b.half())
    with pytest.raises(AssertionError, match="other sizes"):
        wrong.pin(adapter)


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_that_do_not_exist(adapters, slot):
    with pytest.raises(AssertionError):
        SlotStore(TARGETS, 2, torch.device("cpu")).load(slot, adapters[0])
