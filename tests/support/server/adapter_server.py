"""The real HTTP server, engine, registry, store and adapter manager over a made-up model whose every token depends on
what is in the adapter slots and on whose keys and values it sees: one of another version shows.
"""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from guanaco.adapters.peft.weights import BASE_FINGERPRINT_KEY, WEIGHTS_NAME, AdapterLimits
from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.adapters.versions.registry_file import RegistryFile
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.adapters.versions.store import VersionStore
from guanaco.server.adapters.hub import AdapterHub
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.adapters.sources import AdapterPolicy
from guanaco.server.api.generation.catalog import Catalog, ServedModel
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.engine.loading_queue import LoadingQueue
from guanaco.server.engine.request import SampledToken, SamplingParams, ScheduledBatch, ScheduledSequence
from support.adapters.tiny_adapters import make_adapter
from support.server.api_server import BASE, MAX_MODEL_LEN
from support.server.engine_server import BLOCK_SIZE, EngineServer, MadeUpModel, make_engine_server, next_token
from support.server.fake_engine import FakeTemplate

TARGETS = {"layers.0.self_attn.q_proj": (8, 8), "layers.0.mlp.down_proj": (16, 8)}
FINGERPRINT = "f" * 64
ADMIN = {"Authorization": "Bearer sesame"}


class SlotModel(MadeUpModel):
    """Its tokens come from what was put into the slots, not from what the request says."""

    def __init__(self, registry: AdapterRegistry) -> None:
        super().__init__()
        self._registry = registry
        self.slots: dict[int, str] = {}
        self.params: SamplingParams | None = None  # of the request that got the latest token
        self.inert: set[str] = set()  # versions that change no logit
        self._batch_slots: dict[str, int] = {}
        self._kv: dict[tuple[int, int], str] = {}  # (block, offset) → who wrote the keys and values there

    def load_adapter(self, slot: int, version: str) -> None:
        assert self._registry.host_copy(version).version == version
        self.slots[slot] = version

    def clear_adapter(self, slot: int) -> None:
        del self.slots[slot]

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        self._batch_slots = batch.adapter_slots
        return super().run(batch, begin)

    def _write(self, item: ScheduledSequence) -> str:
        """What is in the request's slots, written to the step's positions; the earlier ones must hold the same. One
        of another version, left by a stale prefix, makes the tokens those of nobody."""
        sequence = item.sequence
        found = ",".join(self.slots[self._batch_slots[lora.version]] for lora in sequence.request.loras)
        end = sequence.num_computed_tokens + item.num_new_tokens
        for position in range(sequence.num_computed_tokens, end):
            self._kv[sequence.block_table[position // BLOCK_SIZE], position % BLOCK_SIZE] = found
        seen = {self._kv[sequence.block_table[p // BLOCK_SIZE], p % BLOCK_SIZE] for p in range(0, end, BLOCK_SIZE)}
        return found if seen == {found} else f"{found} over the keys of {seen}"

    def _token(self, item: ScheduledSequence) -> SampledToken:
        if not item.needs_sample:
            self._write(item)
            return SampledToken(None)
        request = item.sequence.request
        self.params = request.params
        found = self._write(item)
        logits = None
        if request.params.return_logits:
            logits = array("f", [1.0 + bool(found and found not in self.inert)] * 8).tobytes()
        return SampledToken(next_token(tuple(item.sequence.token_ids), found), logits=logits)


class AdapterServer(EngineServer):
    """`root` holds the sources; `restart()` gives a new server over the same store."""

    root: Path
    store: VersionStore
    registry: AdapterRegistry
    manager: AdapterManager
    model: SlotModel

    def source(self, name: str, seed: int, rank: int = 2, base: str | None = None) -> str:
        """Write an adapter below the root, in place of what is there; its source as the admin routes want it.

        base: the fingerprint of the base that it says it was trained on."""
        make_adapter(self.root / name, TARGETS, rank, seed=seed, modules=("q_proj", "down_proj"))
        if base is not None:
            weights = self.root / name / WEIGHTS_NAME
            save_file(load_file(weights), weights, metadata={BASE_FINGERPRINT_KEY: base})
        return name


def make_adapter_server(
    directory: Path,
    *,
    num_slots: int = 3,
    host_memory: int = 1 << 30,
    strict_base: bool = False,
    command_line: dict[str, Path] | None = None,
    keys: Sequence[str] = (),
    hub: AdapterHub | None = None,
    shared: Path | None = None,
    **settings: Any,
) -> AdapterServer:
    """A server that is not started yet. Whatever `directory` holds of an earlier one comes back, after the adapters
    of the `command_line`. shared: a registry that other servers follow, too."""
    directory.mkdir(exist_ok=True)
    made = make_engine_server(**{"max_queued_requests": 512, "adapter_slots": num_slots, **settings})
    scheduler = made.scheduler
    scheduler.residency = ResidencyLedger(SlotTable(num_slots), HostTable(host_memory))
    scheduler.loading = LoadingQueue(scheduler.residency, made.state.settings.adapter_timeout)
    assert scheduler.blocks.block_size == BLOCK_SIZE
    made.sock.close()
    registry = AdapterRegistry(
        TARGETS, base_names=(BASE,), limits=AdapterLimits(max_rank=64), templates=frozenset({"guanaco"})
    )
    model = SlotModel(registry)
    made.state.engine._engine._runner = model
    root = directory / "root"
    root.mkdir(exist_ok=True)
    store = VersionStore(directory / "store", TARGETS, registry.holds, limits=AdapterLimits(max_rank=64))
    manager = AdapterManager(
        registry,
        store,
        RegistryFile(store.directory / "registry.json"),
        made.state.engine,
        AdapterPolicy(root, FINGERPRINT, strict_base, hub),
        probe_token_ids=(1, 2, 3),
        on_change=lambda: made.state.metrics.adapters.set_names(registry.names_by_version(), registry.names()),
        on_load=made.state.metrics.adapters.observe_load,
        on_stage=made.state.metrics.adapters.observe_stage,
        shared=None if shared is None else SharedRegistry(shared),
    )
    made.state.metrics.adapters.set_device(lambda: registry.names_of(scheduler.residency.slots.resident))
    for name, path in (command_line or {}).items():
        registry.load(name, path)
    manager.restore()
    made.state.metrics.adapters.set_names(registry.names_by_version(), registry.names())
    base = ServedModel(BASE, MAX_MODEL_LEN, root=BASE, base_fingerprint=FINGERPRINT)
    for field, value in (
        ("catalog", Catalog(base, live=registry, aliases=manager.aliases.table)),
        ("keys", KeyRing(keys)),
        ("admin_keys", KeyRing(["sesame"])),
        ("named_template", {"guanaco": FakeTemplate(("### Human",))}.__getitem__),
        ("adapters", manager),
    ):
        object.__setattr__(made.state, field, value)
    server = AdapterServer(made.state, model, scheduler)
    server.root, server.store, server.registry, server.manager = root, store, registry, manager
    torch.manual_seed(0)
    return server
