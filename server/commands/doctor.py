"""`guanaco doctor`: what this machine has, what would run here, and whether the chosen model would fit.

Looks and loads nothing: the fit is worked out from a model's configuration. Exit code 1 if something would not work.
"""

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guanaco.kernels import PROVIDERS, NativeUnavailable
from guanaco.kernels.cpu.library import available_isas
from guanaco.models.architectures.config import LlamaConfig, read_config
from guanaco.models.architectures.kv_cache import block_bytes
from guanaco.models.architectures.llama import projection_shapes
from guanaco.models.errors import ModelError
from guanaco.server.bootstrap.dtypes import expected_cache_dtype, name_of
from guanaco.server.bootstrap.gpu import Gpu, find_gpu
from guanaco.server.bootstrap.machine import Machine, look
from guanaco.server.bootstrap.memory_plan import human_bytes
from guanaco.server.config import Settings, SettingsError

# Bits of one NF4 weight with double quantisation: 4, 8 per 64 for its scale, 32 per 16384 for the scale's scale.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_LEAST_DISK_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    ok: bool = True
    advice: str = ""


def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print what was found; the exit code."""
    machine = look()
    findings = [*_machine(machine), *_software(), _disk(settings), *_fit(settings, machine)]
    ok = all(finding.ok for finding in findings)
    if as_json:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if ok else 1
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        advice = f"\n[yellow]{escape(finding.advice)}[/]" if finding.advice else ""
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.name, escape(finding.value) + advice)
    Console(highlight=False, soft_wrap=True).print(table)
    return 0 if ok else 1


def _machine(machine: Machine) -> list[Finding]:
    flags = " ".join(machine.cpu_flags) or "none of the instruction sets that the native kernels look for"
    memory = f"{human_bytes(machine.memory_bytes)}, {human_bytes(machine.memory_available_bytes)} available"
    return [
        Finding("processor", f"{machine.cpu_name}, {machine.cpu_count} usable ({flags})"),
        Finding("memory", memory),
        _gpu(find_gpu(), machine),
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
    """Its version, and what of our kernels has run where."""
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
    """Room below the nearest directory that exists."""
    try:
        place = cache_dir = settings.cache_dir
    except SettingsError as error:
        return Finding("cache", "none", ok=False, advice=str(error))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    advice = "" if free >= _LEAST_DISK_BYTES else "models may not fit: free some space, or set --cache"
    return Finding("cache", f"{cache_dir}, {human_bytes(free)} free", free >= _LEAST_DISK_BYTES, advice)


def _fit(settings: Settings, machine: Machine) -> list[Finding]:
    """Whether a local model directory would fit; a hub id is not downloaded for it."""
    if settings.model is None:
        return [Finding("model", "the demo (SmolLM2-135M-Instruct): about 1 GiB with decoded weights, fits")]
    path = Path(os.path.expanduser(settings.model))
    if not path.is_dir():
        return [Finding("model", f"{settings.model}: not a directory here, its fit is not worked out")]
    try:
        config = read_config(path)
    except ModelError as error:
        return [Finding("model", settings.model, ok=False, advice=str(error))]
    weights = weights_bytes(config)
    fits = weights < machine.memory_available_bytes
    advice = "" if fits else "it needs more memory than is available"
    dtype = expected_cache_dtype(settings)
    token = f"{human_bytes(block_bytes(config, 1, dtype))} a token in {name_of(dtype)}"
    value = f"{settings.model}: about {human_bytes(weights)} in NF4, KV cache {token}"
    return [Finding("model", value, fits, advice)]


def weights_bytes(config: LlamaConfig) -> int:
    """Bytes of the NF4 projections with double quantisation, and of everything else in 16 bit; no decoded copies."""
    projections = config.num_layers * sum(n * k for n, k in projection_shapes(config).values())
    heads = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return int(projections * NF4_BITS / 8) + heads * 2
