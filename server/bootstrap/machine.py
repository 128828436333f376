"""The limits of this machine or container: processors, memory, instruction sets.

Reads /proc and the cgroup files only; knows nothing of models. Used for defaults, the start-up plan and `doctor`.
"""

import math
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Machine:
    """The machine as it is now. Sizes are in bytes."""

    cpu_name: str
    cpu_count: int  # processors that this process may use, cgroup quota included
    cpu_flags: tuple[str, ...]
    memory_bytes: int  # memory that this process may use in all
    memory_available_bytes: int
    has_nvidia_driver: bool


def look(cgroup: Path = _CGROUP, proc: Path = Path("/proc")) -> Machine:
    """Read the machine's limits now."""
    name, flags = _cpu_info(proc)
    total, available = memory(cgroup, proc)
    return Machine(
        cpu_name=name,
        cpu_count=_cpu_count(cgroup),
        cpu_flags=tuple(flag for flag in _CPU_FLAGS if flag in flags),
        memory_bytes=total,
        memory_available_bytes=available,
        has_nvidia_driver=(proc / "driver/nvidia/version").exists(),
    )


def _cpu_count(cgroup: Path) -> int:
    """How many processors this process may use: by affinity and by the cgroup's quota (v2 `cpu.max`, v1 `cpu.cfs_*`),
    rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words(cgroup / "cpu.max")
    if not quota:
        quota = _words(cgroup / "cpu/cpu.cfs_quota_us") + _words(cgroup / "cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0] not in ("max", "-1"):
        allowed = min(allowed, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, allowed)


def memory(cgroup: Path = _CGROUP, proc: Path = Path("/proc")) -> tuple[int, int]:
    """(bytes of memory that this process may use, how many of them are free now): the container's if it has a limit,
    else the machine's."""
    sizes = {}
    for line in _text(proc / "meminfo").splitlines():
        key, _, value = line.partition(":")
        sizes[key] = int(value.split()[0]) * 1024 if value.split() else 0
    total, available = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    for limit, usage, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        words = _words(cgroup / limit)
        if words and words[0] != "max" and int(words[0]) < total:
            total = int(words[0])
            used = int((_words(cgroup / usage) or ["0"])[0])
            available = min(available, total - max(0, used - _cached_file_bytes(cgroup / stat)))
    return total, max(0, available)


def _cached_file_bytes(stat: Path) -> int:
    """Bytes of files that a container's kernel keeps in memory and gives up first. `memory.current` counts them as
    used, MemAvailable of a machine does not."""
    pairs = (line.split() for line in _text(stat).splitlines())
    sizes = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    return sizes.get("total_inactive_file", sizes.get("inactive_file", 0))  # v1 has both; `total_…` counts child groups


def _cpu_info(proc: Path) -> tuple[str, set[str]]:
    name, flags = "", set[str]()
    for line in _text(proc / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return name or platform.processor() or platform.machine(), flags  # `processor` is slow: it starts a process


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    """The file's text; empty if there is no such file, as with another cgroup version or another system."""
    try:
        return path.read_text()
    except OSError:
        return ""


def resident_bytes(proc: Path = Path("/proc")) -> int:
    """The bytes of memory that this process uses now; 0 if the system does not say."""
    pages = _words(proc / "self/statm")[1:2]
    return int(pages[0]) * resource.getpagesize() if pages else 0
