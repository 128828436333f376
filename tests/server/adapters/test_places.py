"""The places for adapters as they are wired: none but the host's on a CPU, an arena with a ledger on another device.

No GPU is asked: torch's "meta" device has addresses and sizes, and no memory.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.kernels.lora_batch import LoraPair
from guanaco.server.bootstrap.runtime import CPU_FLOOD_STEP_TOKENS, _adapter_places, _flood_step_tokens
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError
from support.adapters.tiny_adapters import make_adapter

TARGETS = {"layers.0.self_attn.q_proj": (64, 64), "layers.0.mlp.up_proj": (64, 128)}
RANK = 8
HALF_BYTES = 2 * RANK * (64 + 64 + 64 + 128)


def places(tmp_path: Path, device: str, **settings: Any) -> tuple[Any, Any, str]:
    registry = AdapterRegistry(TARGETS, base_names=())
    version = registry.load("a", make_adapter(tmp_path, TARGETS, RANK)).version
    base: Any = SimpleNamespace(loaded=SimpleNamespace(model=SimpleNamespace(lora_targets=TARGETS)))

    def place(pairs: list[LoraPair]) -> list[LoraPair]:
        return [LoraPair(p.a.half().to(device), p.b.half().to(device), p.scale) for p in pairs]

    ops: Any = SimpleNamespace(name="triton", device=torch.device(device), place_adapter=place)
    table, store = _adapter_places(Settings(adapter_slots=2, **settings), base, registry, ops)
    assert table.pin([version]) is not None
    store.load(0, registry.host_copy(version))
    return table, store, version


def test_a_device_of_its_own_has_an_arena_that_the_ledger_knows(tmp_path: Path) -> None:
    table, store, _ = places(tmp_path, "meta", adapter_device_memory=1 << 20)
    assert (table.num_bytes, table.used_bytes) == (1 << 20, HALF_BYTES)
    assert store.num_bytes == HALF_BYTES
    pair = store.table.pairs[0, 0]
    assert pair.a.untyped_storage().nbytes() == 1 << 20, "it lies in the arena"


def test_on_the_cpu_there_is_none(tmp_path: Path) -> None:
    table, _, _ = places(tmp_path, "cpu")
    assert (table.num_bytes, table.used_bytes) == (0, 0)


def test_an_adapter_that_never_fits_is_said_at_the_start(tmp_path: Path) -> None:
    places(tmp_path, "meta", adapter_device_memory=HALF_BYTES)
    with pytest.raises(CommandError, match="--adapter-device-memory"):
        places(tmp_path, "meta", adapter_device_memory=HALF_BYTES - 1)


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cpu", {}, CPU_FLOOD_STEP_TOKENS),
        ("meta", {}, 0),
        ("cpu", {"flood_step_tokens": 0}, 0),
        ("meta", {"flood_step_tokens": 5}, 5),
    ],
)
def test_a_flood_has_short_steps_where_steps_take_long(
    tmp_path: Path, device: str, settings: dict[str, int], expected: int
) -> None:
    registry = AdapterRegistry(TARGETS, base_names=())
    ops: Any = SimpleNamespace(device=torch.device(device))
    alone = 0 if expected == CPU_FLOOD_STEP_TOKENS else expected
    assert _flood_step_tokens(Settings(**settings), registry, ops) == alone, "the base is alone"
    assert _flood_step_tokens(Settings(admin_key="k", **settings), registry, ops) == expected
    registry.load("a", make_adapter(tmp_path, TARGETS, RANK))
    assert _flood_step_tokens(Settings(**settings), registry, ops) == expected
