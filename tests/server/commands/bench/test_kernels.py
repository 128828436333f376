"""`guanaco bench kernels`: its keys, its errors, and bitsandbytes' shipped binary under the same counter."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.kernels.compiling import GUANACO, run_compiling

pytest.importorskip("triton")

from guanaco.server.commands.bench import kernels, kernels_gpu

KEYS = [
    "kernel", "target", "rows", "config", "registers", "spills", "local_bytes", "shared_bytes", "occupancy",
    "issue_slots_per_weight", "tensor_core_instructions", "load_width_bytes", "bytes_floor", "predicted_bound",
]  # fmt: skip


def _library() -> Path:
    spec = find_spec("bitsandbytes")
    libraries = sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda130.so")) if spec and spec.origin else []
    if not libraries:
        pytest.skip("bitsandbytes brings no CUDA library here")
    return libraries[0]


def test_one_kernel_as_the_command_prints_it(tmp_path: Path) -> None:
    process = run_compiling(
        [*GUANACO, "bench", "kernels", "--json", "--targets", "sm_86", "--kernels", "scale_rows"], tmp_path
    )
    assert process.returncode == 0, process.stderr
    entries = json.loads(process.stdout)
    assert entries
    for e in entries:
        assert list(e) == KEYS
        assert (e["target"], e["spills"], e["local_bytes"]) == ("sm_86", 0, 0)


def test_bitsandbytes_counts_as_by_hand() -> None:
    """The instructions of its loops on sm_90 for 32 weights a lane, as they were counted before this counter was."""
    entries = list(kernels.bitsandbytes_entries(_library(), ["sm_90"]))
    assert all(list(e) == KEYS for e in entries)
    slots = {(e["kernel"].split(" ")[1], e["rows"]): e["issue_slots_per_weight"] for e in entries}
    instructions = {key: round(value * 32, 1) for key, value in slots.items()}
    assert instructions[("gemm_4bit_simt", 1)] == 279.0  # 8.7 a weight
    assert instructions[("gemm_4bit_simt", 2)] == 408.0  # 12.8
    assert instructions[("gemm_4bit_simt", 4)] == pytest.approx(650, abs=0.1)  # 20.3
    assert instructions[("gemm_4bit_sm80_m16n8k16", 16)] == 260.0  # 8.1
    assert {e["spills"] for e in entries} == {0}
    tensor = {e["kernel"].split(" ")[1]: e["tensor_core_instructions"] > 0 for e in entries}
    assert tensor == {"kgemm_4bit_inference_naive": False, "gemm_4bit_simt": False, "gemm_4bit_sm80_m16n8k16": True}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--targets", "sm_70"], "--targets sm_70: expected some of sm_75"),
        (["--kernels", "no_such_kernel", "--targets", "sm_80"], "no kernel is called no_such_kernel"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    process = run_compiling([*GUANACO, "bench", "kernels", "--json", *arguments], tmp_path)
    assert process.returncode == 2
    assert complaint in process.stderr.splitlines()[-1]
    assert process.stdout == ""


def test_the_committed_counts_of_bitsandbytes_are_complete() -> None:
    path = Path(__file__).parents[4] / "loadtest" / "results" / "bitsandbytes-kernels-2026-11-24.json"
    results = json.loads(path.read_text())
    assert all(list(e) == KEYS for e in results["kernels"])
    assert {e["target"] for e in results["kernels"]} >= {"sm_80", "sm_86", "sm_89", "sm_90"}


class _Properties:
    """As the driver states them: kHz and bits."""

    def __init__(self, clock: int, width: int) -> None:
        self.memory_clock_rate, self.memory_bus_width = clock, width


@pytest.mark.parametrize(
    ("name", "properties", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", _Properties(2_619_000, 5120), 3352),
        ("NVIDIA H100 PCIe", _Properties(1_593_000, 5120), 2039),  # not the SXM's
        ("NVIDIA L40S", _Properties(9_001_000, 384), 864),  # not the L4's
        ("NVIDIA L4", object(), 300),  # a torch that does not tell
        ("NVIDIA GeForce RTX 4090", object(), 1008),
        ("NVIDIA A100-SXM4-80GB", object(), 2039),
        ("NVIDIA L40S", object(), None),
        ("NVIDIA A10G", object(), None),
    ],
)
def test_the_bandwidth_that_shares_are_of(name: str, properties: object, gigabytes: int | None) -> None:
    found = kernels_gpu.bandwidth(name, properties)
    assert (found is None) == (gigabytes is None)
    assert found is None or found / 1e9 == pytest.approx(gigabytes, rel=0.001)
