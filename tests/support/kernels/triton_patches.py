"""Patches of Triton's interpreter, so that it runs what ships: inline PTX, and bfloat16 and fp8 that are right.

Called by tests/conftest.py, and by programs that run kernels with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from support.kernels.ptx_arithmetic import UINT, Bits, PtxError, halves
from support.kernels.ptx_interpreter import evaluate


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

    inputs = [v.data.view(UINT[v.data.itemsize * 8]) for v in values]
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
    return [np.stack(halves(o), axis=-1).reshape(*o.shape[:-1], -1) for o in outputs]


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
