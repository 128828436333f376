"""Triton's interpreter, made to run what ships: inline PTX in numpy, bit by bit, and bfloat16 and fp8 that are right.

`evaluate` runs the text of one asm block on arrays of bits and knows nothing of Triton; `install` puts it under
`tl.inline_asm_elementwise`. Called by tests/conftest.py, and by whoever runs kernels with TRITON_INTERPRET=1.
Registers are raw bits; an instruction that is not listed here raises, so that nothing is skipped unseen.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[Any]

_WIDTH = {"h": 16, "r": 32, "f": 32, "l": 64, "d": 64}
_UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_INT = {16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


class PtxError(Exception):
    """The asm text does something that the evaluator doesn't know, or that real hardware would not do as meant."""


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
            value = np.zeros(self._shape, _UINT[width])
            for i, part in enumerate(parts):
                value = value | (self.read(part, each).astype(_UINT[width]) << _UINT[width](i * each))
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
        return np.full(self._shape, _immediate(operand, width), _UINT[width])

    def write(self, operand: str, value: Bits, width: int) -> None:
        value = np.broadcast_to(value, self._shape)
        if value.dtype != _UINT[width]:
            value = value.view(_UINT[width]) if value.itemsize * 8 == width else value.astype(_UINT[width])
        if operand.startswith("{"):
            parts = [p.strip() for p in operand.strip("{}").split(",")]
            each = width // len(parts)
            for i, part in enumerate(parts):
                if part != "_":
                    self.write(part, (value >> _UINT[width](i * each)).astype(_UINT[each]), each)
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
        machine.define(f"${i}", operand.width, np.array(bits).view(_UINT[operand.width]))
        if operand.tied is not None:
            machine.define(f"${operand.tied}", operand.width, np.array(bits).view(_UINT[operand.width]))
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


def _prmt(a: Bits, b: Bits, selector: Bits) -> Bits:
    """Four bytes out of the eight of {b, a}; a selector's top bit spreads the byte's sign instead."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte >= 128, np.uint32(0xFF), np.uint32(0))
        chosen = np.where(nibble >= 8, sign, byte.astype(np.uint32))
        out |= chosen << np.uint32(8 * i)
    return out


def _lop3(a: Bits, b: Bits, c: Bits, table: int) -> Bits:
    out = np.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _shift(bits: Bits, amount: Bits, left: bool, signed: bool) -> Bits:
    """PTX clamps the amount: everything is shifted out from the register's width on."""
    width = bits.itemsize * 8
    clamped = np.minimum(amount, np.uint32(width - 1)).astype(bits.dtype)
    if signed and not left:
        return (bits.view(_INT[width]) >> clamped.astype(_INT[width])).view(bits.dtype)
    shifted = bits << clamped if left else bits >> clamped
    return np.where(amount >= width, bits.dtype.type(0), shifted)


def _halves(bits: Bits) -> tuple[Bits, Bits]:
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def _pack(low: Bits, high: Bits) -> Bits:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def to_double(bits: Bits, kind: str) -> npt.NDArray[np.float64]:
    """The values of f16, bf16, f32 or f64 bits."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(_FLOAT[int(kind[1:])]).astype(np.float64)


def from_double(values: npt.NDArray[np.float64], kind: str) -> Bits:
    """Nearest even, once: float64 to the bits of f16, bf16, f32 or f64."""
    if kind != "bf16":
        width = int(kind[1:])
        return values.astype(_FLOAT[width]).view(_UINT[width])
    # Rounded to odd in float32 first, so that the second rounding sees which side of a tie the value was on.
    single = np.atleast_1d(values.astype(np.float32))
    exact = np.atleast_1d(values)
    bits = single.view(np.uint32).copy()
    bits -= (np.abs(single.astype(np.float64)) > np.abs(exact)).astype(np.uint32)
    bits |= (bits.view(np.float32).astype(np.float64) != exact).astype(np.uint32)
    bits = np.where(np.isnan(exact), np.uint32(0x7FFF0000), bits)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint64(16)
    return rounded.astype(np.uint16).reshape(values.shape)


def _fma_exact(a: Bits, b: Bits, c: Bits, kind: str) -> Bits:
    """a·b + c with one rounding: the product of 24-bit numbers is exact in float64, the sum is rounded to odd."""
    product = to_double(a, kind) * to_double(b, kind)
    addend = to_double(c, kind)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (np.asarray(total).view(np.uint64) & np.uint64(1)) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    total = np.where(np.isfinite(total) & (error != 0) & even, odd, total)
    return from_double(total, kind)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
}


def _float_op(name: str, kind: str, operands: list[Bits]) -> Bits:
    if kind.endswith("x2"):
        halves = [_halves(o) for o in operands]
        return _pack(
            _float_op(name, kind[:-2], [h[0] for h in halves]), _float_op(name, kind[:-2], [h[1] for h in halves])
        )
    if name == "fma":
        return _fma_exact(operands[0], operands[1], operands[2], kind)
    width = 16 if kind == "bf16" else int(kind[1:])
    sign = _UINT[width](1 << (width - 1))
    if name == "neg":
        return operands[0] ^ sign
    if name == "abs":
        return operands[0] & ~sign
    if kind == "f64":
        raise PtxError("f64 arithmetic is not evaluated")
    # 53 bits are more than twice 24 and two: rounding a single sum or product twice is the same as once.
    return from_double(_ARITHMETIC[name](*(to_double(o, kind) for o in operands)), kind)


def _integer_op(name: str, width: int, signed: bool, operands: list[Bits]) -> Bits:
    values = [o.view(_INT[width]) for o in operands] if signed else operands
    if name in ("mad", "fma"):
        return (values[0] * values[1] + values[2]).view(_UINT[width])
    if name == "neg":
        return (np.uint64(0) - operands[0].astype(np.uint64)).astype(_UINT[width])
    return np.asarray(_ARITHMETIC[name](*values)).view(_UINT[width])


def _convert(parts: list[str], operands: list[Bits]) -> Bits:
    """cvt[.rn|.rz|…].to.from, and the packing form cvt.rn.f16x2.f32 d, high, low."""
    to, source = parts[-2], parts[-1]
    rounding = [p for p in parts[1:-2] if p not in ("rn", "rni", "ftz")]
    if rounding:
        raise PtxError(f"cvt with .{rounding[0]} is not evaluated")
    if to in ("f16x2", "bf16x2"):
        high, low = (from_double(to_double(o, source), to[:-2]) for o in operands)
        return _pack(low, high)
    if source[0] in "su":
        width = int(source[1:])
        values = (operands[0].view(_INT[width]) if source[0] == "s" else operands[0]).astype(np.float64)
        if to[0] in "su":
            wide = operands[0].view(_INT[width]) if source[0] == "s" else operands[0]
            return wide.astype(_INT[int(to[1:])] if source[0] == "s" else _UINT[int(to[1:])]).view(_UINT[int(to[1:])])
        return from_double(values, to)
    if to[0] in "su":
        width = int(to[1:])
        limits = np.iinfo(_INT[width] if to[0] == "s" else _UINT[width])
        values = np.clip(np.nan_to_num(np.rint(to_double(operands[0], source))), limits.min, limits.max)
        return values.astype(_INT[width] if to[0] == "s" else _UINT[width]).view(_UINT[width])
    return from_double(to_double(operands[0], source), to)


def _source_width(kind: str) -> int:
    if kind.endswith("x2"):
        return 32
    return 16 if kind == "bf16" else int(kind[1:])


def _execute(machine: _Machine, instruction: _Instruction) -> None:
    parts = instruction.opcode.split(".")
    name, kind = parts[0], parts[-1]
    target, *sources = instruction.operands
    if name == "cvt":
        values = [machine.read(s, _source_width(kind)) for s in sources]
        machine.write(target, _convert(parts, values), _source_width(parts[-2]))
        return
    if name == "ld":
        _load(machine, instruction)
        return
    if not re.fullmatch(r"[busf]\d+|bf16|b?f16x2", kind):
        raise PtxError(f"{instruction.text}: not evaluated")
    width = _source_width(kind)
    if parts == ["mad", "wide", "u32"]:
        factors = [machine.read(s, 32).astype(np.uint64) for s in sources[:2]]
        machine.write(target, factors[0] * factors[1] + machine.read(sources[2], 64), 64)
        return
    is_shift = name in ("shl", "shr")
    if name == "lop3":
        *sources, table = sources
    values = [machine.read(s, 32 if is_shift and i == 1 else width) for i, s in enumerate(sources)]
    if name == "prmt" and parts == ["prmt", "b32"]:
        result = _prmt(*values)
    elif name == "lop3" and kind == "b32":
        result = _lop3(*values, int(table, 0))
    elif name in ("and", "or", "xor"):
        result = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name](*values)
    elif name == "not":
        result = ~values[0]
    elif name == "mov":
        result = values[0]
    elif is_shift:
        result = _shift(values[0], values[1], name == "shl", kind[0] == "s")
    elif name == "shf" and kind == "b32" and parts[2] == "wrap":
        both = values[0].astype(np.uint64) | (values[1].astype(np.uint64) << np.uint64(32))
        amount = (values[2] & np.uint32(31)).astype(np.uint64)
        moved = both << amount if parts[1] == "l" else both >> amount
        result = (moved >> np.uint64(32) if parts[1] == "l" else moved).astype(np.uint32)
    elif name == "bfe" and kind in ("u32", "s32"):
        result = _bit_field(values, kind)
    elif "f" in kind and name in ("fma", "neg", "abs", *_ARITHMETIC) and not {"sat", "relu", "rz"} & set(parts):
        result = _float_op(name, kind, values)
    elif kind[0] in "su" and name in ("mad", "neg", *_ARITHMETIC) and not {"hi", "wide", "sat"} & set(parts):
        result = _integer_op(name, width, kind[0] == "s", values)
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
    dtype = np.dtype(_UINT[width])
    loaded = interpreter.load(flat, np.ones(flat.shape, np.bool_), np.zeros(flat.shape, dtype), dtype)
    return np.asarray(loaded).reshape(addresses.shape)


def _bit_field(values: list[Bits], kind: str) -> Bits:
    if kind == "s32":
        raise PtxError("bfe.s32 is not evaluated")
    start, length = values[1] & np.uint32(0xFF), values[2] & np.uint32(0xFF)
    mask = np.where(length >= 32, np.uint64(0xFFFFFFFF), (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
    return (_shift(values[0], start, left=False, signed=False).astype(np.uint64) & mask).astype(np.uint32)


# ---- under Triton's interpreter


class _Results:
    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


def install() -> None:
    """Patch Triton's interpreter (3.9, private classes) in this process, once: inline asm, bfloat16, e4m3."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    if getattr(interpreter.InterpreterBuilder, "guanaco_ptx", False):
        return
    interpreter.InterpreterBuilder.guanaco_ptx = True
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm
    _shield_bfloat16(interpreter)
    _round_as_cards_do(interpreter)


def _create_inline_asm(
    self: Any, asm: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> _Results:
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    inputs = [v.data.view(_UINT[v.data.itemsize * 8]) for v in values]
    shape = np.broadcast_shapes(*(i.shape for i in inputs))
    if pack == 1:
        outputs = evaluate(asm, constraints, inputs)
    elif pack == 2:
        outputs = _evaluate_pairs(asm, constraints, [np.broadcast_to(i, shape) for i in inputs])
    else:
        raise PtxError(f"pack={pack}: Triton does not say which elements it groups; use pack=1 on 32-bit words")
    if len(outputs) != len(types):
        raise PtxError(f"the constraints name {len(outputs)} outputs and Triton expects {len(types)}")
    handles = []
    for bits, kind in zip(outputs, types, strict=True):
        scalar = kind.scalar
        dtype = _get_np_dtype(scalar)
        if dtype.itemsize != bits.itemsize:
            raise PtxError(f"an output of {bits.itemsize * 8} bits is declared as {scalar}")
        handles.append(TensorHandle(np.array(np.broadcast_to(bits, shape)).view(dtype), scalar))
    return _Results(handles)


def _evaluate_pairs(asm: str, constraints: str, inputs: Sequence[Bits]) -> list[Bits]:
    """pack=2 as it is in the layout of a tensor core's left operand: neighbours of the last axis are one pair.

    Triton leaves open what it groups. Whoever uses pack=2 proves from the machine code that it is these; 32-bit
    elements come in one register each, 16-bit results leave two to a register, the first in the lower half.
    """
    if any(i.itemsize != 4 or i.shape[-1] % 2 for i in inputs):
        raise PtxError("pack=2 is only evaluated for 32-bit inputs, an even number of them")
    outputs = evaluate(asm, constraints, [i[..., place::2] for i in inputs for place in (0, 1)])
    if any(o.itemsize != 4 for o in outputs):
        raise PtxError("pack=2 is only evaluated for results of 16 bits, two to a 32-bit register")
    return [np.stack(_halves(o), axis=-1).reshape(*o.shape[:-1], -1) for o in outputs]


def _shield_bfloat16(interpreter: Any) -> None:
    """bfloat16 is kept as uint16 there: products go through float32, any other arithmetic on it raises."""
    import triton.language as tl

    builder = interpreter.InterpreterBuilder

    def single(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, single(a), single(b), d, *rest)

    builder.create_dot = create_dot

    def refusing(plain: Callable[..., Any], count: int) -> Callable[..., Any]:
        def operation(self: Any, *args: Any) -> Any:
            # np.where only moves bits, so a choice between two is right as it is.
            if args[-1] is not np.where and any(a.dtype.scalar == tl.bfloat16 for a in args[:count]):
                raise PtxError("the interpreter would compute on the raw bits of bfloat16: cast to float32 first")
            return plain(self, *args)

        return operation

    for name, count in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3)):
        if hasattr(builder, name):
            setattr(builder, name, refusing(getattr(builder, name), count))

    plain_check = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, inputs: Any) -> Any:
        if any(getattr(i, "dtype", None) == tl.bfloat16 for i in inputs):
            raise PtxError("the interpreter would reduce the raw bits of bfloat16: cast to float32 first")
        return plain_check(self, inputs)

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


def _round_as_cards_do(interpreter: Any) -> None:
    """Conversions to bfloat16 and e4m3: to the nearest, ties to even, the latter saturating, as `cvt.rn(.satfinite)`.

    As they come they cut bfloat16's low bits off, take an integer's bits for those of a bfloat16, and lose the carry
    of a mantissa that is rounded up in fp8.
    """
    import torch
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, kind: Any) -> Any:
        before, after = source.dtype.scalar, kind.scalar
        if after == tl.bfloat16 and before != tl.bfloat16:
            single = np.ascontiguousarray(source.data.astype(np.float32)).view(np.uint32)
            nearest = (single + 0x7FFF + (single >> 16 & 1)) >> 16
            bits = np.where((single & 0x7FFFFFFF) > 0x7F800000, single >> 16 | 0x40, nearest)
            return handle(bits.astype(np.uint16), after)
        if before == tl.bfloat16 and after != tl.float32:
            return plain_cast(self, plain_cast(self, source, tl.float32), kind)
        return plain_cast(self, source, kind)

    def fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        before, after = source.dtype.scalar, kind.scalar
        if before == tl.float8e4nv:
            values = torch.from_numpy(np.array(source.data)).view(torch.float8_e4m3fn).float().numpy()
            return cast(self, handle(values, tl.float32), kind)
        if after == tl.float8e4nv:
            single = torch.from_numpy(np.array(cast(self, source, tl.float32).data)).clamp(-448.0, 448.0)
            return handle(single.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), after)
        return plain_fp_to_fp(self, source, kind, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast, fp_to_fp
