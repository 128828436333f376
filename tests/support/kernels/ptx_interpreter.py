"""Runs inline PTX in numpy, bit by bit: `evaluate` runs the text of one asm block on arrays of bits.

Knows nothing of Triton: `triton_patches` connects it with `tl.inline_asm_elementwise`. `ptx_arithmetic` computes.
Registers are raw bits. An instruction that is not listed here raises PtxError, so that none is skipped unnoticed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from support.kernels.ptx_arithmetic import (
    ARITHMETIC,
    UINT,
    Bits,
    PtxError,
    bit_field,
    convert,
    float_op,
    integer_op,
    lop3,
    prmt,
    shift,
    source_width,
)

_WIDTH = {"h": 16, "r": 32, "f": 32, "l": 64, "d": 64}


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: tuple[str, ...]
    text: str


# ---- parsing


@lru_cache(maxsize=256)
def _parse(asm: str) -> tuple[tuple[_Instruction, ...], dict[str, int]]:
    """Instructions, and the declared registers with their widths."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", asm, flags=re.S).strip()
    widths: dict[str, int] = {}
    instructions = []
    # The outer braces are a scope; the others are vectors such as {a, b}.
    if text.startswith("{") and text.endswith("}") and re.match(r"\{[^{}]*;", text):
        text = text[1:-1]
    for statement in (part.strip() for part in text.split(";")):
        if not statement:
            continue
        if statement.startswith(".reg"):
            _declare(statement, widths)
            continue
        if statement[0] == "@":
            raise PtxError(f"predicated instructions are not evaluated: {statement}")
        opcode, _, rest = statement.partition(" ")
        operands = tuple(o.strip() for o in re.split(r",(?![^{]*\})", rest))
        instructions.append(_Instruction(opcode, operands, statement))
    return tuple(instructions), widths


def _declare(statement: str, widths: dict[str, int]) -> None:
    match = re.fullmatch(r"\.reg\s+\.([busf])(16x2|\d+)\s+(.*)", statement, flags=re.S)
    if match is None:
        raise PtxError(f"declaration not understood: {statement}")
    width = 32 if match[2] == "16x2" else int(match[2])
    for name in (n.strip() for n in match[3].split(",")):
        many = re.fullmatch(r"(\S+)<(\d+)>", name)
        for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            widths[one] = width


@dataclass
class _Operand:
    width: int
    early: bool
    tied: int | None = None


def _constraints(text: str) -> tuple[list[_Operand], list[_Operand]]:
    outputs, inputs = [], []
    for part in (p.strip() for p in text.split(",")):
        if part.startswith("~"):
            continue
        letter = part.lstrip("=&")
        if letter.isdigit():
            inputs.append(_Operand(outputs[int(letter)].width, early=False, tied=int(letter)))
            continue
        if letter not in _WIDTH:
            raise PtxError(f"constraint {part!r} is not evaluated")
        operand = _Operand(_WIDTH[letter], early="&" in part)
        (outputs if part.startswith("=") else inputs).append(operand)
    return outputs, inputs


# ---- evaluation


class _Machine:
    """The registers of one asm block: name → bits."""

    def __init__(self, widths: dict[str, int], shape: tuple[int, ...]) -> None:
        self._widths = dict(widths)
        self._values: dict[str, Bits] = {}
        self._shape = shape

    def define(self, name: str, width: int, value: Bits | None = None) -> None:
        self._widths[name] = width
        if value is not None:
            self._values[name] = value

    def width(self, operand: str) -> int:
        operand = operand.strip()
        if operand not in self._widths:
            raise PtxError(f"{operand} is not declared")
        return self._widths[operand]

    def read(self, operand: str, width: int) -> Bits:
        if operand.startswith("{"):
            parts = [p.strip() for p in operand.strip("{}").split(",")]
            each = width // len(parts)
            value = np.zeros(self._shape, UINT[width])
            for i, part in enumerate(parts):
                value = value | (self.read(part, each).astype(UINT[width]) << UINT[width](i * each))
            return value
        if operand == "%lanemask_lt" and width == 32:
            lanes = np.arange(int(np.prod(self._shape)), dtype=np.uint32).reshape(self._shape) % np.uint32(32)
            return (np.uint32(1) << lanes) - np.uint32(1)
        if operand in self._values:
            value = self._values[operand]
            if value.itemsize * 8 != width:
                raise PtxError(f"{operand} has {value.itemsize * 8} bits where {width} are read")
            return value
        if operand in self._widths:
            raise PtxError(f"{operand} is read before anything was written to it")
        return np.full(self._shape, _immediate(operand, width), UINT[width])

    def write(self, operand: str, value: Bits, width: int) -> None:
        value = np.broadcast_to(value, self._shape)
        if value.dtype != UINT[width]:
            value = value.view(UINT[width]) if value.itemsize * 8 == width else value.astype(UINT[width])
        if operand.startswith("{"):
            parts = [p.strip() for p in operand.strip("{}").split(",")]
            each = width // len(parts)
            for i, part in enumerate(parts):
                if part != "_":
                    self.write(part, (value >> UINT[width](i * each)).astype(UINT[each]), each)
            return
        if self.width(operand) != width:
            raise PtxError(f"{operand} has {self.width(operand)} bits where {width} are written")
        self._values[operand] = value


def _immediate(text: str, width: int) -> int:
    try:
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return int(text[2:], 16)
        return int(text.rstrip("U"), 0) & ((1 << width) - 1)
    except ValueError:
        raise PtxError(f"{text} is neither a register nor a number") from None


def evaluate(asm: str, constraints: str, inputs: Sequence[Bits]) -> list[Bits]:
    """Run one asm block elementwise: unsigned arrays in, one unsigned array per output. PtxError where it can't.

    An output without `&` may be given an input's register: writing it before the last read of the inputs raises.
    """
    outputs, expected = _constraints(constraints)
    if len(expected) != len(inputs):
        raise PtxError(f"the constraints name {len(expected)} inputs and {len(inputs)} came")
    shape = np.broadcast_shapes(*(np.shape(i) for i in inputs)) if inputs else ()
    instructions, widths = _parse(asm.replace("$$", "$").replace("%%", "%"))
    machine = _Machine(widths, shape)
    for i, output in enumerate(outputs):
        machine.define(f"${i}", output.width)
    for i, (operand, value) in enumerate(zip(expected, inputs, strict=True), start=len(outputs)):
        bits = np.broadcast_to(np.asarray(value), shape)
        if bits.itemsize * 8 != operand.width:
            raise PtxError(f"input {i - len(outputs)} has {bits.itemsize * 8} bits, its register {operand.width}")
        machine.define(f"${i}", operand.width, np.array(bits).view(UINT[operand.width]))
        if operand.tied is not None:
            machine.define(f"${operand.tied}", operand.width, np.array(bits).view(UINT[operand.width]))
    _check_early_clobbers(instructions, outputs, len(expected))
    with np.errstate(all="ignore"):
        for instruction in instructions:
            _execute(machine, instruction)
    return [machine.read(f"${i}", output.width) for i, output in enumerate(outputs)]


def _check_early_clobbers(instructions: Sequence[_Instruction], outputs: list[_Operand], num_inputs: int) -> None:
    names = {f"${i}" for i in range(len(outputs), len(outputs) + num_inputs)}

    def mentions(operand: str) -> set[str]:
        return set(re.findall(r"\$\d+", operand))

    last_read = max(
        (n for n, i in enumerate(instructions) if any(mentions(o) & names for o in i.operands[1:])), default=-1
    )
    for instruction in instructions[: max(last_read, 0)]:
        for name in mentions(instruction.operands[0]):
            if int(name[1:]) < len(outputs) and not outputs[int(name[1:])].early:
                raise PtxError(
                    f"{name} is written by {instruction.text!r} before the last input is read: it needs '=&'"
                )


# ---- instructions


def _execute(machine: _Machine, instruction: _Instruction) -> None:
    parts = instruction.opcode.split(".")
    name, kind = parts[0], parts[-1]
    target, *sources = instruction.operands
    if name == "cvt":
        values = [machine.read(s, source_width(kind)) for s in sources]
        machine.write(target, convert(parts, values), source_width(parts[-2]))
        return
    if name == "ld":
        _load(machine, instruction)
        return
    if not re.fullmatch(r"[busf]\d+|bf16|b?f16x2", kind):
        raise PtxError(f"{instruction.text}: not evaluated")
    width = source_width(kind)
    if parts == ["mad", "wide", "u32"]:
        factors = [machine.read(s, 32).astype(np.uint64) for s in sources[:2]]
        machine.write(target, factors[0] * factors[1] + machine.read(sources[2], 64), 64)
        return
    is_shift = name in ("shl", "shr")
    if name == "lop3":
        *sources, table = sources
    values = [machine.read(s, 32 if is_shift and i == 1 else width) for i, s in enumerate(sources)]
    if name == "prmt" and parts == ["prmt", "b32"]:
        result = prmt(*values)
    elif name == "lop3" and kind == "b32":
        result = lop3(*values, int(table, 0))
    elif name in ("and", "or", "xor"):
        result = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](*values)
    elif name == "not":
        result = ~values[0]
    elif name == "mov":
        result = values[0]
    elif is_shift:
        result = shift(values[0], values[1], name == "shl", kind[0] == "s")
    elif name == "shf" and kind == "b32" and parts[2] == "wrap":
        both = values[0].astype(np.uint64) | (values[1].astype(np.uint64) << np.uint64(32))
        amount = (values[2] & np.uint32(31)).astype(np.uint64)
        moved = both << amount if parts[1] == "l" else both >> amount
        result = (moved >> np.uint64(32) if parts[1] == "l" else moved).astype(np.uint32)
    elif name == "bfe" and kind in ("u32", "s32"):
        result = bit_field(values, kind)
    elif "f" in kind and name in ("fma", "neg", "abs", *ARITHMETIC) and not {"sat", "relu", "rz"} & set(parts):
        result = float_op(name, kind, values)
    elif kind[0] in "su" and name in ("mad", "neg", *ARITHMETIC) and not {"hi", "wide", "sat"} & set(parts):
        result = integer_op(name, width, kind[0] == "s", values)
    else:
        raise PtxError(f"{instruction.text}: not evaluated")
    machine.write(target, result, width)


def _load(machine: _Machine, instruction: _Instruction) -> None:
    """ld.global.nc[.v2|.v4].type: from the addresses themselves, which must be multiples of all that is loaded."""
    match = re.fullmatch(r"ld\.global\.nc(?:\.v([24]))?\.([bufs])(8|16|32|64)", instruction.opcode)
    target, source = instruction.operands
    bracket = re.fullmatch(r"\[\s*([^\s+]+)(?:\s*\+\s*(\d+))?\s*\]", source)
    if match is None or bracket is None:
        raise PtxError(f"{instruction.text}: not evaluated")
    count, width = int(match[1] or 1), int(match[3])
    addresses = machine.read(bracket[1], 64) + np.uint64(bracket[2] or 0)
    if (addresses % np.uint64(count * width // 8)).any():
        raise PtxError(f"{instruction.text}: an address that is not aligned")
    targets = [t.strip() for t in target.strip("{}").split(",")]
    if len(targets) != count:
        raise PtxError(f"{instruction.text}: {count} registers expected")
    for i, register in enumerate(targets):
        # Registers may be wider than what is loaded, which is then extended with zeros.
        if match[2] == "s" and machine.width(register) != width:
            raise PtxError(f"{instruction.text}: sign extension is not evaluated")
        machine.write(register, _memory(addresses + np.uint64(i * width // 8), width), machine.width(register))


def _memory(addresses: Bits, width: int) -> Bits:
    from triton._C.libtriton import interpreter

    flat = np.ascontiguousarray(addresses, dtype=np.uint64).reshape(-1)
    dtype = np.dtype(UINT[width])
    loaded = interpreter.load(flat, np.ones(flat.shape, np.bool_), np.zeros(flat.shape, dtype), dtype)
    return np.asarray(loaded).reshape(addresses.shape)
