"""`guanaco doctor`: what this machine has, what would run here, and which models, adapters and contexts would fit.

Loads no model and downloads nothing: `doctor_fit.py` computes what fits. Exit code 1 if something would not work.
"""

import contextlib
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import httpx2
from huggingface_hub import constants
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guanaco.kernels import PROVIDERS, NativeUnavailable
from guanaco.kernels.cpu.library import available_isas
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.config_json import read_config
from guanaco.models.architectures.kv_cache import block_bytes
from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import open_checkpoint
from guanaco.server.bootstrap.dtypes import expected_cache_dtype, name_of
from guanaco.server.bootstrap.gpu import Gpu, find_gpu
from guanaco.server.bootstrap.machine import Machine, look
from guanaco.server.bootstrap.memory_plan import human_bytes
from guanaco.server.commands.doctor_fit import ADAPTER_COUNTS, ADAPTER_RANK, Fit, predict, predict_known
from guanaco.server.config import Settings, SettingsError

_LEAST_DISK_BYTES = 1 << 30
_HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    ok: bool = True
    advice: str = ""


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print the findings and what would fit. Returns the exit code."""
    machine, gpu = look(), find_gpu()
    model, own = _model(settings, machine, gpu)
    findings = [*_machine(machine, gpu), *_software(), _disk(settings), _hub(settings), model]
    fits = [*own, *predict_known(settings, machine, gpu)]
    ok = all(finding.ok for finding in findings)
    if as_json:
        told = {"ok": ok, "findings": [asdict(f) for f in findings], "fits": [asdict(fit) for fit in fits]}
        print(json.dumps(told, indent=2))
        return 0 if ok else 1
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        advice = f"\n[yellow]{escape(finding.advice)}[/]" if finding.advice else ""
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.name, escape(finding.value) + advice)
    console = Console(highlight=False)
    console.print(table, soft_wrap=True)
    _print_fits(console, fits, machine, gpu)
    return 0 if ok else 1


def _print_fits(console: Console, fits: list[Fit], machine: Machine, gpu: Gpu | None) -> None:
    free = machine.memory_available_bytes if gpu is None else gpu.free_bytes
    console.print(
        f"\nWhat fits into {human_bytes(free)} with these settings: tokens of the longest request × how many such "
        f"requests at once, by the number of adapters (rank {ADAPTER_RANK}). "
        "Adapters beyond --adapter-host-memory wait on disk.\n"
    )
    table = Table("model", "weights", "no adapter", *(f"{count}" for count in ADAPTER_COUNTS), box=None, pad_edge=False)
    for fit in fits:
        rooms = {room.adapters: f"{room.context} × {room.requests}" for room in fit.rooms}
        cells = (rooms.get(count, "no") for count in (0, *ADAPTER_COUNTS))
        table.add_row(escape(fit.model), human_bytes(fit.weights_bytes), *cells)
    console.print(table)


def _machine(machine: Machine, gpu: Gpu | None) -> list[Finding]:
    flags = " ".join(machine.cpu_flags) or "none of the instruction sets that the native kernels look for"
    memory = f"{human_bytes(machine.memory_bytes)}, {human_bytes(machine.memory_available_bytes)} available"
    return [
        Finding("processor", f"{machine.cpu_name}, {machine.cpu_count} usable ({flags})"),
        Finding("memory", memory),
        _gpu(gpu, machine),
    ]


def _gpu(gpu: Gpu | None, machine: Machine) -> Finding:
    if gpu is not None:
        memory = f"{human_bytes(gpu.memory_bytes)}, {human_bytes(gpu.free_bytes)} free"
        return Finding("GPU", f"{gpu.name}, {gpu.target}, {memory}")
    if machine.has_nvidia_driver:
        advice = "install a build of torch with CUDA (pip install torch) to use it"
        return Finding("GPU", "an NVIDIA driver is loaded, but torch finds no GPU: the CPU computes", advice=advice)
    return Finding("GPU", "none; none is needed")


def _software() -> list[Finding]:
    import torch

    findings = [
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", f"{version('torch')}, {'with' if torch.cuda.is_available() else 'without'} CUDA"),
    ]
    findings.append(_triton())
    compiler = shutil.which("g++") or shutil.which("c++")
    findings.append(Finding("C++ compiler", compiler or "none (only needed when guanaco is installed)"))
    findings.append(_providers())
    return findings


def _triton() -> Finding:
    """Triton's version, and on which hardware our kernels have run."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return Finding("triton", "not installed (only needed with an NVIDIA GPU)")
    from guanaco.kernels.triton.ops import HAS_RUN

    return Finding("triton", f"{found}; {HAS_RUN}")


def _providers() -> Finding:
    automatic = "cpu" if find_gpu() is None or find_spec("triton") is None else "triton"
    try:
        isas = available_isas()
    except NativeUnavailable as error:
        if automatic == "triton":
            return Finding("kernel providers", "reference, triton; `auto` takes triton")
        return Finding("kernel providers", "reference; `auto` takes it, and it is slow", advice=str(error))
    takes = f"cpu with {isas[0]}" if automatic == "cpu" else automatic
    return Finding("kernel providers", f"{', '.join(PROVIDERS)} ({', '.join(isas)}); `auto` takes {takes}")


def _disk(settings: Settings) -> Finding:
    """Free space at the cache directory, or at its nearest parent that exists."""
    try:
        place = cache_dir = settings.cache_dir
    except SettingsError as error:
        return Finding("cache", "none", ok=False, advice=str(error))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    advice = "" if free >= _LEAST_DISK_BYTES else "models may not fit: free some space, or set --cache"
    return Finding("cache", f"{cache_dir}, {human_bytes(free)} free", free >= _LEAST_DISK_BYTES, advice)


def _hub(settings: Settings) -> Finding:
    """Whether the hub answers. That is only an error if the settings need the hub."""
    if settings.offline or constants.is_offline_mode():
        return Finding("hub", "not asked: offline")
    is_needed = settings.hub_adapters or settings.hub_adapters_unpinned or _is_hub_id(settings.model)
    advice = "check the network or the proxy; what was downloaded before is used with --offline"
    try:
        answer = httpx2.head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return Finding("hub", f"{constants.ENDPOINT} does not answer ({error})", not is_needed, advice)
    if answer.is_server_error:
        return Finding("hub", f"{constants.ENDPOINT} answers {answer.status_code}", not is_needed, advice)
    return Finding("hub", f"{constants.ENDPOINT} answers")


def _is_hub_id(model: str | None) -> bool:
    return model is not None and not Path(os.path.expanduser(model)).exists()


def _model(settings: Settings, machine: Machine, gpu: Gpu | None) -> tuple[Finding, list[Fit]]:
    """Whether the chosen model would fit, with its adapters. A hub id is not downloaded to find out."""
    if settings.model is None:
        return Finding("model", "the demo (SmolLM2-135M-Instruct)"), []
    path = Path(os.path.expanduser(settings.model))
    if not path.exists():
        return Finding("model", f"{settings.model}: not here, so its fit is not worked out"), []
    try:
        config = _config(path)
        config.check_window(str(path), settings.max_model_len)
    except ModelError as error:
        return Finding("model", settings.model, ok=False, advice=str(error)), []
    fit = predict(path.name, config, settings, machine, gpu)
    dtype = expected_cache_dtype(settings)
    token = f"{human_bytes(block_bytes(config, 1, dtype))} a token in {name_of(dtype)}"
    value = f"{settings.model}: about {human_bytes(fit.weights_bytes)} in NF4, KV cache {token}"
    advice = "" if fit.rooms else "it needs more memory than is available: free some, or choose a smaller model"
    return Finding("model", value, bool(fit.rooms), advice), [fit]


def _config(path: Path) -> ModelConfig:
    if path.is_dir():
        return read_config(path)
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        return checkpoint.config
