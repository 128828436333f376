"""`guanaco serve`: loads the model, prints the banner, and serves until it is stopped.

Connects the runtime with the HTTP side. Called by the command line.
"""

import contextlib
import faulthandler
import ipaddress
import json
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.versions.holds import HoldLedger
from guanaco.adapters.versions.registry_file import RegistryFile
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.adapters.versions.store import VersionStore
from guanaco.models.text.chat_template import named_template
from guanaco.models.text.template_renderer import shared_renderer
from guanaco.server.adapters.hub import AdapterHub
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.adapters.sources import AdapterPolicy
from guanaco.server.api.generation.catalog import Catalog, ServedModel
from guanaco.server.api.generation.sampling import SamplingDefaults
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.access_log import start_logging
from guanaco.server.api.http.auth import KeyRing
from guanaco.server.api.loading import answering_while_loading
from guanaco.server.api.server import bind, serve
from guanaco.server.bootstrap.dtypes import name_of
from guanaco.server.bootstrap.gpu import device_of
from guanaco.server.bootstrap.machine import memory, resident_bytes
from guanaco.server.bootstrap.memory_plan import human_bytes
from guanaco.server.bootstrap.runtime import Base, Runtime, build_runtime
from guanaco.server.bootstrap.training import training_service
from guanaco.server.commands.streams import end_at_sigterm
from guanaco.server.config import Settings
from guanaco.server.engine.async_engine import AsyncEngine, QueueCaps
from guanaco.server.errors import CommandError
from guanaco.server.metrics.limits import publish_limits
from guanaco.server.metrics.server import Metrics
from guanaco.server.training.jobs.service import TrainingService

logger = logging.getLogger("guanaco.serve")

# The prompt with which an adapter is probed when it is loaded: a text that most fine-tunes answer in their own way.
_PROBE_TEXT = "### Human: Who are you, and what can you do for me?### Assistant:"
_LOG_WIDTH = 160  # columns of the banner in a file or a container's log


def run_server(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code. Errors in the settings are found before anything slow happens."""
    keys, admin_keys = KeyRing.from_settings(settings), KeyRing.admin(settings)
    _check_exposure(settings, keys)
    check_origins(settings, keys)
    faulthandler.enable()  # writes the stacks to the log if native code crashes
    sock = bind(settings)
    port = sock.getsockname()[1]
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)
    with _ending_at_sigterm(), answering_while_loading(settings, sock) as progress:
        runtime = build_runtime(settings, console, watch=progress.report)
        state = _api_state(settings, runtime, keys, admin_keys)
    stop_logging = start_logging(settings.log_level)

    def started() -> None:
        _show_banner(console, settings, runtime, port, bool(keys))
        threading.Thread(target=state.grammars.warm_up, name="guanaco-warm-up", daemon=True).start()

    try:
        return serve(state, sock, on_started=started)
    finally:
        shared_renderer().close()  # a template that is still being rendered would delay the end
        stop_logging()


@contextlib.contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """End the process with one line at a SIGTERM, also if it is the first process of its container."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    signal.signal(signal.SIGTERM, end_at_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_exposure(settings: Settings, keys: KeyRing) -> None:
    """Raise CommandError if the server would be reachable from other machines without an API key, unless the operator
    allows it."""
    if keys or settings.allow_unauthenticated or _is_loopback(settings.host):
        return
    raise CommandError(
        f"--host {settings.host} is reachable from other machines and no API key is set: "
        "set --api-key (or --api-key-file), or say --allow-unauthenticated"
    )


def check_origins(settings: Settings, keys: KeyRing) -> None:
    """Raise CommandError if API keys are set and --allow-origin is `*`: every web page could then try keys."""
    if keys and "*" in settings.allow_origin:
        raise CommandError(
            "--allow-origin * is for servers without API keys: name the origins, e.g. https://chat.example"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _probe_token_ids(base: Base, most: int) -> tuple[int, ...]:
    """The token ids with which adapters are probed: at most `most`, and only ids that the model has."""
    num_rows = base.loaded.config.vocab_size
    return tuple(index for index in base.tokenizer.encode(_PROBE_TEXT) if index < num_rows)[:most]


def _api_state(settings: Settings, runtime: Runtime, keys: KeyRing, admin_keys: KeyRing) -> ApiState:
    base, plan = runtime.base, runtime.plan
    metrics = Metrics(
        base.name,
        max_model_len=plan.max_model_len,
        adapter_slots=settings.adapter_slots,
        max_adapter_labels=settings.metrics_adapters,
        old_names=settings.metrics_compat,
    )
    cache_dtype = name_of(runtime.kv_dtype)
    publish_limits(metrics.registry, max_queued_requests=settings.max_queued_requests, memory=memory)
    metrics.set_cache_config(block_size=plan.block_size, num_blocks=plan.num_blocks, cache_dtype=cache_dtype)
    engine = AsyncEngine(
        runtime.engine,
        base.tokenizer,
        QueueCaps(settings.max_queued_requests, settings.max_queued_tokens),
        step_timeout_seconds=settings.step_timeout,
        on_step=metrics.observe_step,
    )
    metrics.set_heartbeat(lambda: engine.heartbeat_age_seconds)
    training = training_service(settings, base.loaded.fingerprint, runtime.num_threads, _num_parameters(base))
    manager = _adapter_manager(settings, runtime, engine, metrics, training)
    if training is not None:
        metrics.set_training(training.numbers)
    served = ServedModel(base.name, plan.max_model_len, root=base.root, base_fingerprint=base.loaded.fingerprint)
    return ApiState(
        engine=engine,
        tokenizer=base.tokenizer,
        catalog=Catalog(served, live=runtime.registry, aliases=None if manager is None else manager.aliases.table),
        settings=settings,
        metrics=metrics,
        version=version("guanaco"),
        num_rows=base.loaded.config.vocab_size,
        defaults=SamplingDefaults.from_generation_config(base.generation_config),
        keys=keys,
        admin_keys=admin_keys,
        adapters=manager,
        training=training,
        chat_template=base.template,
        named_template=named_template,
        eos_ids=base.eos_ids,
        runs_on={"provider": runtime.ops.name, "device": device_of(runtime.ops)},
    )


def _num_parameters(base: Base) -> int:
    """About how many weights the base has: those of its projections and of its embedding."""
    config = base.loaded.config
    projections = sum(rows * columns for rows, columns in base.loaded.model.lora_targets.values())
    return projections + config.vocab_size * config.hidden_size


def _adapter_manager(
    settings: Settings, runtime: Runtime, engine: AsyncEngine, metrics: Metrics, training: TrainingService | None
) -> AdapterManager | None:
    """The adapter manager, with the adapters loaded before a restart; None if adapters can't change."""

    def show_names() -> None:
        metrics.adapters.set_names(runtime.registry.names_by_version(), runtime.registry.names())

    manager = None
    if settings.adapters_change:
        base = runtime.base
        store = _open_store(settings, base, runtime.registry.holds)
        policy = AdapterPolicy(
            root=_absolute(settings.adapter_root),
            base_fingerprint=base.loaded.fingerprint,
            strict_base=settings.strict_base,
            hub=AdapterHub.of(settings) if settings.hub_adapters or settings.hub_adapters_unpinned else None,
            trained=None if training is None else training.jobs.adapters,
        )
        manager = AdapterManager(
            runtime.registry,
            store,
            RegistryFile(store.directory / "registry.json"),
            engine,
            policy,
            probe_token_ids=_probe_token_ids(base, runtime.plan.max_model_len - 1),
            on_change=show_names,
            on_load=metrics.adapters.observe_load,
            on_stage=metrics.adapters.observe_stage,
            device_bytes=runtime.slots.bytes_of,
            shared=_shared_registry(settings, base),
        )
        for note in manager.restore():
            logger.warning(note)
    show_names()
    residency = runtime.engine.scheduler.residency
    metrics.adapters.set_device(lambda: runtime.registry.names_of(residency.slots.resident))
    metrics.adapters.set_tiers(
        sizes={"host": lambda: runtime.registry.num_bytes, "device": lambda: runtime.slots.num_bytes},
        evictions={"host": lambda: residency.host.num_evictions, "device": lambda: residency.slots.num_evictions},
        counts={
            "stored": lambda: len(runtime.registry.versions()),
            "host": lambda: runtime.registry.num_copies,
            "device": lambda: len(residency.slots.resident),
        },
    )
    return manager


def _open_store(settings: Settings, base: Base, holds: HoldLedger) -> VersionStore:
    """Open the adapter store. Each base model has its own, since an adapter of one is useless for another.

    With a shared registry the server uses a second store, so that a later start without the registry finds the adapters
    that it had before."""
    return VersionStore(
        settings.adapter_store_dir / (_of_base(base) + ("-shared" if settings.adapter_registry is not None else "")),
        base.loaded.model.lora_targets,
        holds,
        limits=AdapterLimits(max_rank=settings.max_lora_rank),
        base_table=base.table,
    )


def _shared_registry(settings: Settings, base: Base) -> SharedRegistry | None:
    shared = _absolute(settings.adapter_registry)
    return None if shared is None else SharedRegistry(shared / _of_base(base))


def _of_base(base: Base) -> str:
    """The name of a base model's folder in a directory that servers of several base models may use."""
    return base.loaded.fingerprint[:16]


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(os.path.abspath(os.path.expanduser(path)))


def _show_banner(console: Console, settings: Settings, runtime: Runtime, port: int, has_keys: bool) -> None:
    """Print the model, its adapters, the provider, the division of memory, the addresses, and a curl line to copy."""
    base, plan, config = runtime.base, runtime.plan, runtime.base.loaded.config
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
    table = Table.grid(padding=(0, 2))
    shape = f"{config.num_layers} layers of {config.hidden_size}, NF4, context {plan.max_model_len}"
    dtype = name_of(runtime.ops.dtype)
    tokens = f"{name_of(runtime.kv_dtype)}, {plan.num_blocks} blocks of {plan.block_size} = {plan.kv_tokens} tokens"
    rows = [
        ("model", f"[bold]{escape(base.name)}[/]  {shape}"),
        ("provider", f"{runtime.ops.name} ({runtime.provider_reason}), {dtype}, {runtime.num_threads} threads"),
        (
            "memory",
            f"{human_bytes(resident_bytes())} in use now. At most: weights {human_bytes(plan.weights_bytes)}"
            f" + KV cache {human_bytes(plan.kv_bytes)} + adapters {human_bytes(plan.adapters_bytes)} = "
            f"{human_bytes(plan.total_bytes)}",
        ),
        ("KV cache", f"{tokens}; {'it fills as requests come' if runtime.ops.name != 'triton' else 'taken at start'}"),
    ]
    for entry in runtime.registry.entries():
        modules = f"{entry.modules_applied} of {entry.modules_possible} modules"
        detail = f"rank {entry.max_rank}, {modules}, {human_bytes(entry.num_bytes)}, version {entry.version[:12]}"
        rows.append(("adapter", f"[bold]{escape(entry.name)}[/]  {detail}"))
    rows += [("note", escape(note)) for note in runtime.notes]
    rows += [("page", f"{url}/")] if settings.page else []
    rows += [("API", f"{url}/v1"), ("metrics", f"{url}/metrics"), ("health", f"{url}/health")]
    for label, text in rows:
        table.add_row(f"[dim]{label}[/]", text)
    console.rule("[bold]Guanaco[/]", align="left")
    console.print(table)
    console.print(f"try it:\n{_curl_line(url, runtime, has_keys)}", markup=False, soft_wrap=True)
    console.rule()


def _curl_line(url: str, runtime: Runtime, has_keys: bool) -> str:
    entries = runtime.registry.entries()
    body = {
        "model": entries[0].name if entries else runtime.base.name,
        "messages": [{"role": "user", "content": "How do I boil an egg?"}],
        "max_tokens": 60,
    }
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_keys else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
