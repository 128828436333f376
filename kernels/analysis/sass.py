"""Machine code of NVIDIA GPUs, counted: the functions of a cubin, their loops, and the instructions in one turn of a
loop.

Reads the text that `nvdisasm` prints. Knows nothing of Triton, nor what the code computes. Called by compile.py for our
kernels and by `guanaco bench kernels` for other people's binaries.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;?\s*\}?\s*$"
)
_LABEL = re.compile(r"^(\.L_\S+):")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_TARGET = re.compile(r"`\((\.L_[^)]+)\)")
_TENSOR_CORE = re.compile(r"^(?:[HIQBDO]G?MMA|UTC[A-Z]*MMA)\b")
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicated: bool

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def jumps(self) -> bool:
        """Whether it jumps to another place in the same function. ptxas writes some jumps out of loops as relative
        calls."""
        return self.name == "BRA" or (self.name == "CALL" and _TARGET.search(self.operands) is not None)

    @property
    def global_load_bytes(self) -> int:
        """Bytes that one lane loads from global memory; 0 for instructions that don't load from it."""
        if self.name not in ("LDG", "LDGSTS"):
            return 0
        for modifier, size in ((".256", 32), (".128", 16), (".64", 8), ("16", 2), ("8", 1)):
            if modifier[0] == "." and modifier in self.opcode:
                return size
            if modifier[0] != "." and re.search(rf"\.[US]{modifier}\b", self.opcode):
                return size
        return 4


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and the blocks that may come next."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]

    @property
    def calls(self) -> bool:
        """Whether it calls a subroutine. A diverged warp or a rare operand takes such a path, the usual path never
        does."""
        return any(i.name == "CALL" and not i.jumps for i in self.instructions)


@dataclass(frozen=True)
class Loop:
    """A natural loop of a converged warp. `blocks` includes the blocks of loops inside it."""

    header: int
    blocks: frozenset[int]
    instructions: tuple[Instruction, ...]
    innermost: bool

    def count(self, prefix: str) -> int:
        return sum(i.opcode.startswith(prefix) for i in self.instructions)

    @property
    def tensor_core_instructions(self) -> int:
        return count_tensor_core(self.instructions)

    @property
    def barriers(self) -> int:
        return sum(i.name in ("BAR", "WARPGROUP", "SYNCS") for i in self.instructions)

    @property
    def shared_memory_operations(self) -> int:
        return sum(
            i.name in ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS", "UTMALDG", "UBLKCP") for i in self.instructions
        )


def _widths(instructions: Iterable[Instruction]) -> dict[int, int]:
    widths: dict[int, int] = {}
    for size in (i.global_load_bytes for i in instructions):
        if size:
            widths[size] = widths.get(size, 0) + size
    return widths


def count_tensor_core(instructions: Iterable[Instruction]) -> int:
    return sum(bool(_TENSOR_CORE.match(i.opcode)) for i in instructions)


def load_width(instructions: Iterable[Instruction], num_bytes: float) -> int:
    """The width in bytes of the loads that bring `num_bytes` bytes of one kind of data; 0 if the code loads fewer
    bytes.

    It is the widest width whose loads bring exactly that many bytes. If there is none, it is a lower limit: narrower
    loads together bring fewer than `num_bytes`, so they can't have brought the data alone.
    """
    widths = _widths(instructions)
    if exact := [width for width, brought in widths.items() if brought == num_bytes]:
        return max(exact)
    brought = 0
    for width in sorted(widths):
        brought += widths[width]
        if brought >= num_bytes:
            return width
    return 0


@dataclass(frozen=True)
class Function:
    """One kernel's code."""

    name: str
    blocks: tuple[Block, ...]

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """All instructions that a converged warp may issue: no divergence handlers, no calls to them, no padding."""
        return tuple(i for n in sorted(self._reachable) for i in self.blocks[n].instructions)

    @cached_property
    def _reachable(self) -> frozenset[int]:
        seen, queue = {0}, [0]
        while queue:
            for n in self.blocks[queue.pop()].successors:
                if n not in seen and not self.blocks[n].calls:
                    seen.add(n)
                    queue.append(n)
        return frozenset(seen)

    @cached_property
    def _predecessors(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {n: set() for n in self._reachable}
        for n in self._reachable:
            for s in self.blocks[n].successors:
                if s in found:
                    found[s].add(n)
        return found

    @cached_property
    def _dominators(self) -> dict[int, frozenset[int]]:
        dominators = dict.fromkeys(self._reachable, self._reachable) | {0: frozenset({0})}
        changed = True
        while changed:
            changed = False
            for n in sorted(self._reachable - {0}):
                new = frozenset.intersection(*(dominators[p] for p in self._predecessors[n])) | {n}
                if new != dominators[n]:
                    dominators[n], changed = new, True
        return dominators

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Natural loops in the order of their first instruction; back edges to one header are one loop."""
        bodies: dict[int, set[int]] = {}
        for n in self._reachable:
            for header in self.blocks[n].successors:
                if header in self._dominators[n]:
                    bodies.setdefault(header, {header}).update(self._body(header, n))
        return tuple(
            Loop(
                header,
                frozenset(body),
                tuple(i for n in sorted(body) for i in self.blocks[n].instructions),
                innermost=not any(other != header and other in body for other in bodies),
            )
            for header, body in sorted(bodies.items())
        )

    def _body(self, header: int, latch: int) -> set[int]:
        body, queue = {header, latch}, [latch]
        while queue:
            n = queue.pop()
            if n == header:
                continue
            new = self._predecessors[n] - body
            body |= new
            queue.extend(new)
        return body

    def executed(self, turns: Mapping[int, float]) -> float:
        """Instructions that one warp issues in the whole kernel. turns: index in `loops` → turns per entry.

        Both sides of a branch count, so the result is an upper bound. A loop that `turns` doesn't name runs once.
        """
        total = 0.0
        for n in self._reachable:
            factor = 1.0
            for index, loop in enumerate(self.loops):
                if n in loop.blocks:
                    factor *= turns.get(index, 1.0)
            total += factor * len(self.blocks[n].instructions)
        return total


# ---- reading the text


def _conditional(instruction: Instruction) -> bool:
    # Newer targets write the condition as an operand: BRA.U !UP0, `(.L_x_1)
    return instruction.predicated or bool(re.match(r"!?U?P\d", instruction.operands))


def _successors(instruction: Instruction | None, following: int | None, labels: Mapping[str, int]) -> tuple[int, ...]:
    nexts = () if following is None else (following,)
    if instruction is None:
        return nexts
    if instruction.jumps:
        target = _TARGET.search(instruction.operands)
        # .DIV leads to the code for diverged warps; .CONV leads past it to the code that follows.
        if target is None or ".DIV" in instruction.opcode:
            return nexts
        taken = (labels[target[1]],) if target[1] in labels else ()
        return taken + nexts if _conditional(instruction) or ".CONV" in instruction.opcode else taken
    if instruction.name in ("EXIT", "RET", "BRX", "KILL") and not _conditional(instruction):
        return ()
    return nexts


def _function(name: str, lines: list[tuple[str | None, Instruction | None]]) -> Function:
    groups: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for label, instruction in lines:
        if label is not None:
            if groups[-1]:
                groups.append([])
            labels[label] = len(groups) - 1
        if instruction is not None:
            groups[-1].append(instruction)
            if instruction.jumps or instruction.name in ("EXIT", "RET", "BRX", "KILL"):
                groups.append([])
    blocks = [
        Block(tuple(g), _successors(g[-1] if g else None, n + 1 if n + 1 < len(groups) else None, labels))
        for n, g in enumerate(groups)
    ]
    return Function(name, tuple(blocks))


def parse(listing: str) -> dict[str, Function]:
    """Functions by their (mangled) names, from what `nvdisasm -c` prints."""
    functions: dict[str, list[tuple[str | None, Instruction | None]]] = {}
    lines: list[tuple[str | None, Instruction | None]] = []
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            lines = functions.setdefault(section[1], [])
        elif label := _LABEL.match(line):
            lines.append((label[1], None))
        elif match := _INSTRUCTION.match(line):
            lines.append((None, Instruction(match[2], match[3], predicated=match[1] is not None)))
    return {name: _function(name, found) for name, found in functions.items()}


@dataclass(frozen=True)
class Resources:
    """The figures of `cuobjdump -res-usage` for a function: per thread; shared memory per block, static only."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def disassemble(cubin: bytes, tools: Path) -> tuple[dict[str, Function], dict[str, Resources]]:
    """(all functions of a cubin, their resources). tools: the folder with nvdisasm and cuobjdump."""
    with tempfile.TemporaryDirectory(prefix="guanaco-sass-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        # Skips the analysis of where branches meet: it takes a third of the time and adds nothing here.
        listing = _run(tools / "nvdisasm", "-c", "-ndf", str(path))
        usage = _run(tools / "cuobjdump", "-res-usage", str(path))
    resources = {}
    for name, text in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        resources[name] = Resources(values["REG"], values["STACK"], values["LOCAL"], values["SHARED"])
    return parse(listing), resources


def extract(binary: Path, target: str, tools: Path) -> bytes:
    """The cubin for `target` ("sm_80") from a shared library with several. Raises FileNotFoundError if it has none."""
    with tempfile.TemporaryDirectory(prefix="guanaco-elf-") as folder:
        _run(tools / "cuobjdump", "-xelf", target, str(binary.resolve()), cwd=Path(folder))
        cubins = sorted(Path(folder).glob(f"*{target}*.cubin"))
        if not cubins:
            raise FileNotFoundError(f"{binary} has no machine code for {target}")
        return max(cubins, key=lambda p: p.stat().st_size).read_bytes()


def _run(tool: Path, *arguments: str, cwd: Path | None = None) -> str:
    return subprocess.run(  # noqa: S603  the tools of Triton's own package, on files that we wrote
        [str(tool), *arguments], cwd=cwd, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    ).stdout
