"""What the ops find in the adapter slots after any order of loads."""

import random

import pytest
import torch
from tiny_adapters import make_adapter

from guanaco.adapters.slot_store import SlotStore
from guanaco.adapters.weights import load_adapter

TARGETS = {"layers.0.self_attn.q_proj": (8, 8), "layers.0.mlp.up_proj": (8, 24), "layers.1.mlp.up_proj": (8, 24)}
MODULES = list(TARGETS)


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


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_that_do_not_exist(adapters, slot):
    with pytest.raises(AssertionError):
        SlotStore(TARGETS, 2, torch.device("cpu")).load(slot, adapters[0])
