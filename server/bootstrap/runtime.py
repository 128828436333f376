"""Builds a running program from the settings: the one place that connects models, adapters, kernels and engine.

Everything is loaded and checked here, before the first request. A problem is raised as one typed error. Used by
`serve`, `generate` and `bench`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import AdapterLimits, check_base
from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.adapters.versions.registry import AdapterEntry, AdapterRegistry
from guanaco.kernels import NativeUnavailable, NoGpu, Ops, load_ops
from guanaco.models.architectures.kv_cache import PagedKVCache, block_bytes
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.checkpoint import stored_table
from guanaco.models.loading.loader import LoadedModel, load_model
from guanaco.models.loading.unread_fields import generation_notes
from guanaco.models.text.chat_template import TEMPLATE_NAMES, ChatTemplate
from guanaco.models.text.special_ids import missing_rows_note, reconcile_special_ids
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.models.text.tokenizer_check import check_tokenizer
from guanaco.server.bootstrap.before_loading import (
    adapter_options,
    adapter_profiles,
    base_name,
    base_root,
    check_before_loading,
    chosen_template,
)
from guanaco.server.bootstrap.dtypes import cache_dtype, compute_dtype
from guanaco.server.bootstrap.gpu import find_gpu, no_gpu_text
from guanaco.server.bootstrap.gpu_runtime import gpu_notes, gpu_reserve_bytes, make_decode_path, use_tuned_kernels
from guanaco.server.bootstrap.machine import look
from guanaco.server.bootstrap.memory_plan import GPU_KV_SHARE, KvRequest, MemoryPlan, plan_memory
from guanaco.server.bootstrap.model_path import find_model
from guanaco.server.bootstrap.progress import Report, reporting
from guanaco.server.bootstrap.speculation import make_drafting
from guanaco.server.config import Settings
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.engine.request import Limits
from guanaco.server.engine.scheduler import Scheduler
from guanaco.server.errors import CommandError

# Tokens per step that flooding adapters may use on a CPU. 32 is about one short prompt, so a new request waits for at
# most about two steps' time.
CPU_FLOOD_STEP_TOKENS = 32


@dataclass(frozen=True)
class Base:
    """The base model with its tokenizer, template and defaults."""

    name: str  # in the API
    root: str  # its source as clients may see it
    loaded: LoadedModel
    tokenizer: Tokenizer
    template: ChatTemplate | None  # used instead of the tokenizer's own
    eos_ids: frozenset[int]
    generation_config: Mapping[str, Any]
    notes: tuple[str, ...]
    path: Path  # the directory or file that was loaded

    def table(self, name: str) -> torch.Tensor | None:
        """The base's embedding or output layer as stored, to compare with one that an adapter saved. None if it can't
        be read."""
        return stored_table(self.path, name)


@dataclass(frozen=True)
class Runtime:
    """A loaded model with its adapters and an engine that is ready to step."""

    base: Base
    ops: Ops
    provider_reason: str  # why this provider was chosen
    registry: AdapterRegistry
    slots: SlotStore
    plan: MemoryPlan
    kv_dtype: torch.dtype  # of the KV cache
    engine: Engine
    num_threads: int
    notes: tuple[str, ...]

    def adapter(self, name: str | None) -> AdapterEntry | None:
        """The adapter with a served name; None for the base. Raises CommandError for an unknown name."""
        if name is None or name == self.base.name:
            return None
        entry = self.registry.resolve(name)
        if entry is None:
            known = ", ".join([self.base.name, *(e.name for e in self.registry.entries())])
            raise CommandError(f"nothing is called {name!r} here; there are: {known}")
        return entry


def build_runtime(
    settings: Settings, console: Console, wanted: str | None = None, *, watch: Report | None = None
) -> Runtime:
    """Load and check everything that `settings` name. Progress goes to `console`.

    wanted: a name that must be served. watch: also gets the progress, as in `reporting`.

    Raises ModelError, AdapterError, TemplateError, SettingsError or CommandError: one line that says what to do.
    """
    check_before_loading(settings, wanted)
    num_threads = settings.threads or look().cpu_count
    ops, reason = _load_provider(settings, num_threads)
    tuned = use_tuned_kernels(settings, ops)
    kv_dtype = cache_dtype(settings, ops)
    # The native kernels have threads of their own. torch's would compete with them after every small op.
    torch.set_num_threads(num_threads if ops.name == "reference" else 1)
    base = _load_base(settings, ops, console, watch)
    registry = _load_adapters(settings, base, console, watch)
    plan = _plan(settings, base, registry, ops, kv_dtype)
    table, slots = _adapter_places(settings, base, registry, ops)
    return Runtime(
        base=base,
        ops=ops,
        provider_reason=reason,
        registry=registry,
        slots=slots,
        plan=plan,
        kv_dtype=kv_dtype,
        engine=_build_engine(settings, base, registry, plan, ops, kv_dtype, table, slots),
        num_threads=num_threads,
        notes=(
            *gpu_notes(settings, ops, base.loaded.model),
            *tuned,
            *base.notes,
            *plan.notes,
            *_adapter_notes(registry, base),
        ),
    )


def _load_provider(settings: Settings, num_threads: int) -> tuple[Ops, str]:
    """(the kernels, why these were chosen). `auto` takes those of a GPU if there is one, else the native ones, else the
    reference."""
    gpu = find_gpu() if settings.provider in ("auto", "triton") else None

    def load(name: str) -> Ops:
        return load_ops(
            name,
            device=torch.device("cuda", 0) if name == "triton" and gpu is not None else torch.device("cpu"),
            dtype=compute_dtype(settings, name, gpu),
            decoded_weights_bytes=settings.decoded_weights_memory,
            threads=num_threads,
            cpu_isa=settings.cpu_isa,
            side_stream=settings.cuda_graphs,
        )

    if settings.provider == "reference":
        return load("reference"), "asked for with --provider"
    without = "no NVIDIA GPU that torch can use"
    if settings.provider == "triton" or gpu is not None:
        try:
            where = f"{gpu.name}, {gpu.target}" if gpu is not None else "Triton's interpreter: for tests only"
            return load("triton"), where + ("; asked for with --provider" if settings.provider == "triton" else "")
        except NativeUnavailable as error:
            if settings.provider == "triton":
                raise CommandError(no_gpu_text() if isinstance(error, NoGpu) else str(error)) from None
            without = f"the GPU is not used: {error}"
    try:
        ops = load("cpu")
    except NativeUnavailable as error:
        if settings.provider == "cpu" or settings.cpu_isa != "auto":
            raise CommandError(str(error)) from None
        return load("reference"), f"slow: {error}"
    except MemoryError as error:
        raise CommandError(f"{error}: lower --threads") from None
    why = "asked for with --provider" if settings.provider == "cpu" else without
    return ops, f"{why}; {getattr(ops, 'isa', '')}"


def _load_base(settings: Settings, ops: Ops, console: Console, watch: Report | None) -> Base:
    path = find_model(settings, console, watch)
    with reporting(console, "model", watch) as report:
        cache = settings.cache_dir if settings.quantized_cache else None
        keep_float32 = settings.dtype == "float32"
        loaded = load_model(
            path,
            ops,
            cache_dir=cache,
            progress=report,
            keep_float32=keep_float32,
            max_model_len=settings.max_model_len,
        )
    template = chosen_template(settings)
    check_tokenizer(path)
    tokenizer = Tokenizer.from_directory(path)
    generation_config = {**loaded.sampling, **_generation_config(path)}
    special = reconcile_special_ids(
        config_bos=loaded.config.bos_token_id,
        config_eos=loaded.config.eos_token_ids,
        generation_eos=generation_config.get("eos_token_id"),
        tokenizer=tokenizer,
        num_rows=loaded.config.vocab_size,
    )
    notes = (
        *loaded.notes,
        *tokenizer.notes,
        *special.notes,
        *generation_notes(generation_config),
        *missing_rows_note(tokenizer, loaded.config.vocab_size),
        *(() if template is None else template.notes),
    )
    return Base(
        name=base_name(settings),
        root=base_root(settings),
        loaded=loaded,
        tokenizer=tokenizer,
        template=template,
        eos_ids=frozenset(special.eos_ids),
        generation_config=generation_config,
        notes=notes,
        path=path,
    )


def _generation_config(path: Path) -> dict[str, Any]:
    """The model's own sampling defaults. A GGUF file and many directories have none."""
    file = path / "generation_config.json"
    if not path.is_dir() or not file.exists():
        return {}
    return read_json(file)


def _load_adapters(settings: Settings, base: Base, console: Console, watch: Report | None) -> AdapterRegistry:
    """Load the adapters of --adapter. Without any, the demo model has its own two."""
    registry = AdapterRegistry(
        base.loaded.model.lora_targets,
        base_names=(base.name,),
        limits=AdapterLimits(max_rank=settings.max_lora_rank),
        templates=TEMPLATE_NAMES,
        base_table=base.table,
    )
    options, profiles = adapter_options(settings), adapter_profiles(settings)
    with reporting(console, "adapters", watch) as report:
        for number, (name, path) in enumerate(options, start=1):
            entry = registry.load(name, path, profiles.get(name))
            if settings.strict_base:
                check_base(registry.host_copy(entry.version), base.loaded.fingerprint)
            report(name, number, len(options))
    return registry


def _plan(settings: Settings, base: Base, registry: AdapterRegistry, ops: Ops, kv_dtype: torch.dtype) -> MemoryPlan:
    config = base.loaded.config
    request = KvRequest(
        block_bytes=block_bytes(config, settings.block_size, kv_dtype),
        block_size=settings.block_size,
        kv_bytes=settings.kv_cache_memory,
        max_model_len=settings.max_model_len,
        model_positions=config.max_position_embeddings,
        max_num_seqs=settings.max_num_seqs,
    )
    loaded, most = registry.num_bytes, settings.adapter_host_memory
    if loaded > most:
        raise CommandError(f"the adapters take {loaded} bytes, and --adapter-host-memory allows {most}: raise it")
    adapters_bytes = most if settings.adapters_change else loaded
    if ops.device.type == "cuda":
        return _gpu_plan(settings, base, request)
    return plan_memory(
        request,
        weights_bytes=base.loaded.weights_bytes,
        adapters_bytes=adapters_bytes,
        free_bytes=look().memory_available_bytes,
        coming_bytes=adapters_bytes - loaded,
    )


def _gpu_plan(settings: Settings, base: Base, request: KvRequest) -> MemoryPlan:
    """The memory plan for a GPU: the adapters' arena is allocated at once, and a step's tensors need free memory."""
    gpu, arena = find_gpu(), settings.adapter_device_memory
    assert gpu is not None
    reserve = arena + gpu_reserve_bytes(settings, base.loaded.config)
    return plan_memory(
        request,
        weights_bytes=base.loaded.weights_bytes,
        adapters_bytes=arena,
        free_bytes=max(0, gpu.free_bytes - reserve),
        share=GPU_KV_SHARE,
    )


def _adapter_places(settings: Settings, base: Base, registry: AdapterRegistry, ops: Ops) -> tuple[SlotTable, SlotStore]:
    """(the ledger of adapter slots, their tensors). On a GPU they get an arena, which is allocated at once."""
    arena_bytes = 0 if ops.device.type == "cpu" else settings.adapter_device_memory
    table = SlotTable(settings.adapter_slots, arena_bytes)
    targets = base.loaded.model.lora_targets
    store = SlotStore(
        targets,
        settings.adapter_slots,
        ops.device,
        ops.place_adapter,
        arena_bytes=arena_bytes,
        offset_of=table.offset_of,
        element_bytes=2 if ops.name == "triton" else None,  # it stores adapters in float16, whatever the file has
    )
    for entry in registry.entries():
        num_bytes = store.bytes_of(registry.host_copy(entry.version))
        if num_bytes > arena_bytes:
            problem = f"adapter {entry.name} takes {num_bytes} bytes of the device"
            raise CommandError(f"{problem}, and --adapter-device-memory allows {arena_bytes}: raise it")
        table.set_size(entry.version, num_bytes)
    return table, store


def _build_engine(
    settings: Settings,
    base: Base,
    registry: AdapterRegistry,
    plan: MemoryPlan,
    ops: Ops,
    kv_dtype: torch.dtype,
    table: SlotTable,
    slots: SlotStore,
) -> Engine:
    model = base.loaded.model
    limits = Limits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        num_rows=model.config.vocab_size,
        queue_timeout_seconds=settings.queue_timeout,
        adapter_timeout_seconds=settings.adapter_timeout,
        flood_step_tokens=_flood_step_tokens(settings, registry, ops),
    )
    kv = PagedKVCache(model.config, plan.num_blocks, plan.block_size, kv_dtype, ops.device)
    path = make_decode_path(settings, model, ops, kv, plan.max_model_len)
    runner = ModelRunner(model, kv, registry, slots, base.eos_ids, path)
    blocks = BlockManager(plan.num_blocks, plan.block_size)
    residency = ResidencyLedger(table, HostTable(settings.adapter_host_memory))
    scheduler = Scheduler(limits, blocks, residency, base.eos_ids)
    scheduler.drafting = make_drafting(settings, ops, runner.probe, base.loaded.fingerprint, base.tokenizer.encode_part)
    return Engine(scheduler, runner)


def _flood_step_tokens(settings: Settings, registry: AdapterRegistry, ops: Ops) -> int:
    """Tokens per step for flooding adapters; 0: no limit. On a CPU a step with many rows takes long, and new requests
    wait for it; on a GPU it takes hardly longer than a small step. Without adapters no limit is needed."""
    if settings.flood_step_tokens is not None:
        return settings.flood_step_tokens
    has_others = bool(registry.entries()) or settings.adapters_change
    return CPU_FLOOD_STEP_TOKENS if has_others and ops.device.type == "cpu" else 0


def _adapter_notes(registry: AdapterRegistry, base: Base) -> list[str]:
    notes = [f"adapter {entry.name}: {note}" for entry in registry.entries() for note in entry.notes]
    for entry in registry.entries():
        try:
            check_base(registry.host_copy(entry.version), base.loaded.fingerprint)
        except AdapterError as error:
            notes.append(f"adapter {entry.name}: {error} (--strict-base would refuse it)")
    return notes
