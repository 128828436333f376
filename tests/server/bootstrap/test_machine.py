"""Limits are read from the files that a container sets, in both cgroup versions."""

import os
from pathlib import Path

import pytest

from guanaco.server.bootstrap.machine import look


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nHugePages_Total: 0\n")
    (folder / "cpuinfo").write_text(
        "processor : 0\nmodel name : Test CPU\nflags : fpu avx2 fma\n\nprocessor : 1\nflags : none\n"
    )
    return folder


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_processors_follow_the_quota(tmp_path: Path, proc: Path, files: dict[str, str], cpus: int | None) -> None:
    affinity = len(os.sched_getaffinity(0))
    expected = affinity if cpus is None else min(cpus, affinity)
    assert look(_write(tmp_path / "cgroup", files), proc).cpu_count == expected


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 16000000 * 1024, 8000000 * 1024),
        ({"memory.max": "max"}, 16000000 * 1024, 8000000 * 1024),
        ({"memory.max": "1000", "memory.current": "400"}, 1000, 600),
        ({"memory.max": "1000", "memory.current": "4000"}, 1000, 0),
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 400\ninactive_file 300\n"}, 1000, 600),
        (
            {
                "memory/memory.limit_in_bytes": "2000",
                "memory/memory.usage_in_bytes": "1500",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n",
            },
            2000,
            1500,
        ),
        ({"memory/memory.limit_in_bytes": "2000", "memory/memory.usage_in_bytes": "500"}, 2000, 1500),
        ({"memory/memory.limit_in_bytes": str(1 << 62)}, 16000000 * 1024, 8000000 * 1024),
    ],
)
def test_memory_follows_the_limit(
    tmp_path: Path, proc: Path, files: dict[str, str], total: int, available: int
) -> None:
    machine = look(_write(tmp_path / "cgroup", files), proc)
    assert (machine.memory_bytes, machine.memory_available_bytes) == (total, available)


def test_instruction_sets_come_from_the_first_processor(tmp_path: Path, proc: Path) -> None:
    machine = look(tmp_path, proc)
    assert (machine.cpu_name, machine.cpu_flags, machine.has_nvidia_driver) == ("Test CPU", ("avx2", "fma"), False)
