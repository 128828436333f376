"""`guanaco bench kernels`: counts the machine code of every Triton kernel for every target, on any machine.

Compiles all kernels that the provider launches (kernels/analysis/launches.py), counts their code and prints one list. A
bitsandbytes library can be counted in the same way. Times need a GPU: kernels_gpu.py.
"""

import json
import sys
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from guanaco.kernels.analysis import cards, sass
from guanaco.kernels.analysis.compile import Analysis, CompileCase, CountError, analyse, count, tools
from guanaco.kernels.triton.configs import TARGETS
from guanaco.server.bootstrap.gpu import find_gpu
from guanaco.server.bootstrap.gpu_runtime import tuned_path
from guanaco.server.config import Settings
from guanaco.server.errors import CommandError

_SIDE = 4096  # rows and columns of the matrix for which bitsandbytes' bytes and bounds are stated


def collect_cases(target: str) -> list[CompileCase]:
    """Every variant of every kernel that the provider launches on this target. Imported here: it needs Triton."""
    from guanaco.kernels.analysis.launches import launches
    from guanaco.kernels.analysis.work import case_of

    return [case_of(launch) for launch in launches(target)]


def entry(case: CompileCase, target: str, analysis: Analysis) -> dict[str, Any]:
    """The figures of one compiled kernel, as one object in the output of `guanaco bench kernels --json`."""
    bound = cards.predicted_bound(
        target, num_bytes=case.bytes_floor, units=case.units, slots_per_unit=analysis.kernel_slots_per_unit
    )
    return {
        "kernel": case.kernel,
        "target": target,
        "rows": case.rows,
        "config": case.config,
        "registers": analysis.registers,
        "spills": analysis.spills,
        "local_bytes": analysis.local_bytes,
        "shared_bytes": analysis.shared_bytes,
        "occupancy": round(analysis.occupancy, 4),
        "issue_slots_per_weight": round(analysis.issue_slots_per_unit, 3),
        "tensor_core_instructions": analysis.tensor_core_instructions,
        "load_width_bytes": analysis.load_width_bytes,
        "bytes_floor": case.bytes_floor,
        "predicted_bound": bound,
    }


def compiled_entries(targets: Collection[str], kernels: Collection[str]) -> Iterator[dict[str, Any]]:
    """Compile and count the kernels; `kernels` empty: all. A case that can't be counted is reported on standard
    error."""
    for target in targets:
        for case in collect_cases(target):
            if kernels and case.kernel not in kernels:
                continue
            try:
                yield entry(case, target, analyse(case, target))
            except CountError as error:
                print(f"guanaco: {target}: {error}", file=sys.stderr)


# ---- bitsandbytes' library


def _bitsandbytes_cases() -> Iterator[tuple[str, CompileCase]]:
    """(beginning of the mangled name, case) of each kernel. In each iteration a lane handles 32 weights, and looks each
    of them up with one instruction, SHFL or LDS.

    The first two kernels compute one output column per warp. The template arguments of the last one name a tile of 32
    rows, 64 columns and 128 weights each, for 256 threads.
    """
    weights = _SIDE * _SIDE

    def case(kernel: str, rows: int, warps: int, marker: str, columns: int) -> CompileCase:
        floor = weights // 2 + weights // 64 + weights // 64 // 64 + 4 * rows * _SIDE
        return CompileCase(
            kernel=f"bitsandbytes {kernel}", function=None, rows=rows, config="bf16", signature={}, constexprs={},
            num_warps=warps, units_per_iteration=32 * 32 * warps, marker=(marker, 1.0), units=weights,
            bytes_floor=floor, bytes_per_unit=0.5, loop_turns={-1: float(_SIDE * columns)},
        )  # fmt: skip

    yield "_Z26kgemm_4bit_inference_naiveI13__nv_bfloat16", case("kgemm_4bit_inference_naive", 1, 4, "LDS", columns=4)
    for rows in (1, 2, 4, 8):
        yield f"_Z14gemm_4bit_simtI13__nv_bfloat16Li{rows}E", case("gemm_4bit_simt", rows, 4, "SHFL", columns=4)
    name = "_Z23gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li32ELi64ELi128E"
    yield name, case("gemm_4bit_sm80_m16n8k16 32x64x128", 16, 8, "SHFL", columns=64)


def bitsandbytes_entries(library: Path, targets: Collection[str]) -> Iterator[dict[str, Any]]:
    """The figures of the kernels in `libbitsandbytes_cuda*.so`, for those of `targets` for which it has code."""
    for target in targets:
        try:
            functions, resources = sass.disassemble(sass.extract(library, target, tools()), tools())
        except FileNotFoundError:
            continue
        for prefix, case in _bitsandbytes_cases():
            for name in (n for n in functions if n.startswith(prefix)):
                try:
                    found = entry(case, target, count(case, target, functions[name], resources[name], 0))
                except CountError:
                    continue  # for this target the library has only a stub of the kernel
                # The binary doesn't say with how many threads the kernel is launched.
                found["occupancy"] = None
                yield found


# ---- the command


def count_kernels(*, targets: str | None, kernels: str | None, bitsandbytes: Path | None, as_json: bool) -> None:
    """Print a table, or JSON. Raises CommandError without Triton, for unknown targets, or if no kernel is selected."""
    if find_spec("triton") is None:
        raise CommandError("the kernels are compiled by Triton, which is not installed (pip install triton)")
    import triton

    if triton.knobs.runtime.interpret:
        raise CommandError("kernels can't be compiled while TRITON_INTERPRET is set: unset it")
    chosen = tuple(targets.split(",")) if targets else TARGETS
    if unknown := [t for t in chosen if t not in TARGETS]:
        raise CommandError(f"--targets {','.join(unknown)}: expected some of {','.join(TARGETS)}")
    names = tuple(kernels.split(",")) if kernels else ()
    entries = list(compiled_entries(chosen, names))
    if not entries:
        raise CommandError(f"no kernel is called {kernels}" if kernels else "this build has no Triton kernels")
    if bitsandbytes is not None:
        if not bitsandbytes.is_file():
            raise CommandError(f"--bitsandbytes {bitsandbytes}: no such file")
        entries += bitsandbytes_entries(bitsandbytes, chosen)
    _add_times(entries)
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    _print_table(entries)


def tune_kernels(settings: Settings) -> None:
    """Time the tiles of `nf4_dot` on this machine's GPU and write the best to the cache. NEVER RUN on a GPU so far.

    Raises CommandError without a GPU."""
    gpu = find_gpu()
    if gpu is None:
        raise CommandError("--tune times kernels on an NVIDIA GPU, and torch finds none")
    import torch

    from guanaco.kernels.analysis.launches import MODELS
    from guanaco.kernels.triton import tuning as triton_tuning
    from guanaco.server.commands.bench.kernels_gpu import microseconds

    shapes = [shape for model in MODELS.values() for shape in model.products]
    tiles = triton_tuning.tune(shapes, torch.device("cuda", 0), microseconds)
    path = tuned_path(settings, gpu.name)
    triton_tuning.save(path, triton_tuning.card_key(gpu.name, gpu.target), tiles)
    print(f"{len(tiles)} tiles are faster than the usual ones here: {path}")


def _add_times(entries: list[dict[str, Any]]) -> None:
    import torch

    if torch.cuda.is_available():
        from guanaco.server.commands.bench.kernels_gpu import add_times

        add_times(entries)


_COLUMNS = {
    "kernel": "kernel",
    "target": "target",
    "rows": "rows",
    "config": "config",
    "registers": "regs",
    "spills": "spills",
    "shared_bytes": "shared",
    "occupancy": "occ.",
    "issue_slots_per_weight": "slots/weight",
    "tensor_core_instructions": "tensor",
    "load_width_bytes": "load B",
    "predicted_bound": "bound",
}


_MEASURED = ("microseconds", "roofline_share", "bitsandbytes_microseconds", "torch_bf16_microseconds")


def _print_table(entries: list[dict[str, Any]]) -> None:
    measured = [key for key in _MEASURED if any(key in e for e in entries)]
    table = Table(*_COLUMNS.values(), *measured, box=None, pad_edge=False)
    for e in entries:
        table.add_row(*("-" if e.get(key) is None else str(e[key]) for key in (*_COLUMNS, *measured)))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
