"""Compiles a Triton kernel for a GPU that this machine doesn't have, and says what the machine code costs.

Knows Triton's compiler and the limits of each compute capability, but neither what a kernel computes nor any card's
speed (cards.py). work.py makes a `CompileCase` of each launch of the provider; `guanaco bench kernels` analyses it.
"""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guanaco.kernels.analysis import sass

_LANES = 32


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one configuration, as it is launched at one shape.

    A unit is a weight, an element of the KV cache, or for elementwise kernels an element. One program handles
    `units_per_iteration` units in one turn of the main loop, as the source writes it. `marker` tells how many of those
    turns one turn of the compiled loop contains: ("PRMT", 1.5) says that each unit has at least 1.5 instructions that
    begin with PRMT; ("bytes", 2.0) says that each unit loads 2 bytes from global memory.
    """

    kernel: str
    function: Any  # the object that @triton.jit made
    rows: int
    config: str
    signature: Mapping[str, str]  # argument → "*fp16", "*i32", "i32", "fp32" …; all arguments that are not constexprs
    constexprs: Mapping[str, Any]
    num_warps: int
    units_per_iteration: int
    marker: tuple[str, float]
    units: int  # of the whole launch
    bytes_floor: int  # bytes that the launch must move
    bytes_per_unit: float  # stored size of a unit: half a byte for a weight
    num_stages: int = 1
    max_registers: int | None = None  # per thread
    not_divisible: Collection[str] = ()  # pointers and integers that are not multiples of 16
    has_loop: bool = True  # False: one program's whole code handles units_per_iteration units
    loop_turns: Mapping[int, float] = field(default_factory=dict)  # turns of other loops, to count the whole kernel
    # per turn, including units beyond a row's end, which are loaded but not counted; 0: the same as the counted ones
    loaded_units: int = 0


@dataclass(frozen=True)
class Architecture:
    """Limits of one compute capability (CUDA C++ Programming Guide 13, "Technical Specifications per CC")."""

    max_warps: int
    max_blocks: int
    shared_bytes: int  # per multiprocessor
    max_shared_bytes: int  # per block
    reserved_shared_bytes: int  # taken by the system from each block's shared memory


_REGISTERS = 65536  # per multiprocessor, every capability here
_REGISTER_UNIT = 256  # a warp gets registers in portions of this many
# Limits of a multiprocessor. 7.5, 8.0, 8.6 and 9.0 agree with NVIDIA's arch_traits.cuh (github.com/NVIDIA/cccl); 8.9,
# 10.0 and 12.0 are from memory of the table in the CUDA programming guide.
ARCHITECTURES = {
    "sm_75": Architecture(32, 16, 64 << 10, 64 << 10, 0),
    "sm_80": Architecture(64, 32, 164 << 10, 163 << 10, 1024),
    "sm_86": Architecture(48, 16, 100 << 10, 99 << 10, 1024),
    "sm_89": Architecture(48, 24, 100 << 10, 99 << 10, 1024),
    "sm_90": Architecture(64, 32, 228 << 10, 227 << 10, 1024),
    "sm_100": Architecture(64, 32, 228 << 10, 227 << 10, 1024),
    "sm_120": Architecture(48, 24, 100 << 10, 99 << 10, 1024),
}


def occupancy(target: str, registers: int, shared_bytes: int, num_warps: int) -> float:
    """The fraction of a multiprocessor's warps that can be resident at once; 0 if not even one block fits."""
    arch = ARCHITECTURES[target]
    if shared_bytes > arch.max_shared_bytes:
        return 0.0
    per_warp = -(-max(registers, 1) * _LANES // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // per_warp // num_warps
    by_shared = arch.shared_bytes // (shared_bytes + arch.reserved_shared_bytes) if shared_bytes else arch.max_blocks
    blocks = min(arch.max_warps // num_warps, arch.max_blocks, by_registers, by_shared)
    return blocks * num_warps / arch.max_warps


@dataclass(frozen=True)
class Compiled:
    """Machine code for one target, with Triton's figures about it."""

    cubin: bytes
    ptx: str
    shared_bytes: int


def tools() -> Path:
    """The folder with Triton's own nvdisasm and cuobjdump."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_case(case: CompileCase, target: str) -> Compiled:
    """Compile for `target` ("sm_80") without a GPU. Nothing is kept on disk.

    Raises RuntimeError inside Triton's interpreter, where kernels can't be compiled. Triton's own errors pass through.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels can't be compiled while TRITON_INTERPRET is set: start a process without it")
    names = case.function.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) ^ set(names)
    assert not unknown, f"{case.kernel}: arguments that are missing or too many: {sorted(unknown)}"
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if (signature[n].startswith("*") or signature[n] in ("i32", "i64")) and n not in case.not_divisible
    }
    source = ASTSource(case.function, signature, dict(case.constexprs), attributes)
    with tempfile.TemporaryDirectory(prefix="guanaco-triton-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", int(target.removeprefix("sm_")), _LANES),
            # Set explicitly, because Triton 3.10 changes the compiler's default.
            options={
                "num_warps": case.num_warps,
                "num_stages": case.num_stages,
                "maxnreg": case.max_registers,
                "enable_fp_fusion": True,
            },
        )
        return Compiled(kernel.asm["cubin"], kernel.asm["ptx"], kernel.metadata.shared)


@dataclass(frozen=True)
class Analysis:
    """The figures of one kernel's machine code for one target. "Per unit" means per unit and lane."""

    registers: int
    spills: int  # loads and stores of spilled registers in the code
    local_bytes: int  # local memory and stack per thread
    shared_bytes: int
    occupancy: float
    issue_slots_per_unit: float
    kernel_slots_per_unit: float  # instructions of the whole kernel, not only of the main loop
    unrolled: int  # turns of the source's loop in one turn of the compiled loop
    tensor_core_instructions: int  # in the whole function
    load_width_bytes: int  # at least some loads that bring the units are this wide
    loop_barriers: int
    loop_shared_operations: int
    loop_shuffles: int
    function: sass.Function
    loop: sass.Loop | None


class CountError(Exception):
    """The machine code has no loop that handles as many units per turn as the case says."""


def analyse(case: CompileCase, target: str) -> Analysis:
    """Compile one case for one target and count. Raises CountError if the code doesn't match the case's description."""
    return count_compiled(case, target, compile_case(case, target))


def count_compiled(case: CompileCase, target: str, compiled: Compiled) -> Analysis:
    """Count the result of `compile_case`."""
    functions, resources = sass.disassemble(compiled.cubin, tools())
    # A division's slow path and similar code are functions of their own; the kernel is the function that the case
    # names.
    name = next(n for n in functions if case.function.__name__ in n)
    return count(case, target, functions[name], resources[name], compiled.shared_bytes)


def count(
    case: CompileCase, target: str, function: sass.Function, resources: sass.Resources, shared_bytes: int
) -> Analysis:
    """Count a function that is already disassembled. Also for kernels that other people compiled."""
    lane_units, lane_loads = (
        units / (_LANES * case.num_warps)
        for units in (case.units_per_iteration, case.loaded_units or case.units_per_iteration)
    )
    loop, unrolled = _main_loop(case, function, lane_units) if case.has_loop else (None, 1)
    counted = loop.instructions if loop else function.instructions
    program_slots = _program_slots(case, function, loop, unrolled)
    spills = sum(i.name in ("LDL", "STL") for i in function.instructions)
    return Analysis(
        registers=resources.registers,
        spills=spills,
        local_bytes=resources.local_bytes + resources.stack_bytes,
        shared_bytes=max(shared_bytes, resources.shared_bytes),
        occupancy=occupancy(target, resources.registers, shared_bytes, case.num_warps),
        issue_slots_per_unit=len(counted) / (lane_units * unrolled),
        kernel_slots_per_unit=program_slots,
        unrolled=unrolled,
        tensor_core_instructions=sass.count_tensor_core(function.instructions),
        load_width_bytes=sass.load_width(counted, case.bytes_per_unit * lane_loads * unrolled),
        loop_barriers=loop.barriers if loop else 0,
        loop_shared_operations=loop.shared_memory_operations if loop else 0,
        loop_shuffles=loop.count("SHFL") if loop else 0,
        function=function,
        loop=loop,
    )


def _marks(marker: str, instructions: tuple[sass.Instruction, ...]) -> float:
    if marker == "bytes":
        return sum(i.global_load_bytes for i in instructions)
    return sum(i.opcode.startswith(marker) for i in instructions)


def _main_loop(case: CompileCase, function: sass.Function, lane_units: float) -> tuple[sass.Loop | None, int]:
    """(the loop with most of the markers, turns of the source's loop in one of its turns). The markers decide the
    turns.

    It is an innermost loop, apart from loops inside it without any marker: from compute capability 10.0 on, code waits
    for tensor cores in such a loop. None instead of a loop: ptxas has unrolled all of the program's turns. Raises
    CountError if there are too few markers: then this is not the described code, and no figures are given.
    """
    name, per_unit = case.marker
    marked = [loop for loop in function.loops if _marks(name, loop.instructions)]
    loops = [loop for loop in marked if not any(other.blocks < loop.blocks for other in marked)]
    if not loops and (function.loops or -1 not in case.loop_turns):
        raise CountError(f"{case.kernel} {case.config}: the machine code has no such loop")
    loop = max(loops, key=lambda candidate: _marks(name, candidate.instructions), default=None)
    marks = _marks(name, loop.instructions if loop else function.instructions)
    unrolled = int(marks / (per_unit * lane_units) + 1e-9)
    wanted = 1 if loop else int(case.loop_turns[-1] / case.units_per_iteration)
    if unrolled < wanted:
        least = per_unit * lane_units * wanted
        raise CountError(f"{case.kernel} {case.config}: {marks} x {name} in the main loop, {least:g} or more expected")
    return loop, unrolled if loop else wanted


def _program_slots(case: CompileCase, function: sass.Function, loop: sass.Loop | None, unrolled: int) -> float:
    """Instructions of all warps divided by units of the launch. The main loop's turns follow from the program's
    units."""
    turns = dict(case.loop_turns)
    program_units = turns.pop(-1, float(case.units_per_iteration))
    if loop is not None:
        turns[function.loops.index(loop)] = program_units / (case.units_per_iteration * unrolled)
    return function.executed(turns) * _LANES * case.num_warps / program_units
