"""Kernels whose machine code has what the counter must find: hand-counted loops, spills, barriers, narrow loads.

Run as a script, without TRITON_INTERPRET, it compiles them for the targets it is given and prints the counts as JSON;
tests/kernels/analysis/test_compile.py starts it.
"""

import json
import sys

import triton
import triton.language as tl

from guanaco.kernels.analysis.compile import CompileCase, CountError, analyse


@triton.jit
def running_sum(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, n, BLOCK):
        total += tl.load(x + j + i)
    tl.store(y + i, total)


@triton.jit
def many_registers(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    other = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, n, BLOCK):
        value = tl.load(x + j + i)
        total += value
        other = other * value + total
    tl.store(y + i, total * other)


@triton.jit
def sum_over_warps(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = 0.0
    for j in range(0, n, BLOCK):
        total = total * 0.5 + tl.sum(tl.load(x + j + i))
    tl.store(y, total)


@triton.jit
def product(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for j in range(0, n, BLOCK):
        a = tl.load(x + j * BLOCK + tile)
        total += tl.dot(a, tl.trans(a))
    tl.store(y + tile, total)


def case(function, block: int, *, element: str = "*fp32", warps: int = 1, units: int = 0, **other) -> CompileCase:
    """A case whose units are the elements that `function` loads."""
    size = {"*fp32": 4.0, "*fp16": 2.0}[element]
    units = units or block
    return CompileCase(
        kernel=function.__name__, function=function, rows=1, config=str(block),
        signature={"x": element, "y": "*fp32", "n": "i32"}, constexprs={"BLOCK": block}, num_warps=warps,
        units_per_iteration=units, marker=("bytes", size), units=4096, bytes_floor=16384, bytes_per_unit=size,
        **{"loop_turns": {-1: 32.0 * units}, **other},
    )  # fmt: skip


def cases() -> dict[str, CompileCase]:
    return {
        "sum": case(running_sum, 128),
        "narrow": case(running_sum, 128, not_divisible=("x",)),
        "registers": case(many_registers, 8192),
        "barrier": case(sum_over_warps, 512, warps=4),
        "product": case(product, 32, element="*fp16", units=1024),
        "wrong": case(running_sum, 128, units=4096),
    }


def main(wanted: list[str]) -> None:
    """`wanted`: such as sum:sm_80."""
    found: dict[str, dict[str, object]] = {}
    for name, target in (w.split(":") for w in wanted):
        one = cases()[name]
        try:
            a = analyse(one, target)
        except CountError as error:
            found[f"{name}:{target}"] = {"error": str(error)}
            continue
        found[f"{name}:{target}"] = {
            **{k: v for k, v in vars(a).items() if isinstance(v, int | float)},
            "loop_instructions": len(a.loop.instructions) if a.loop else 0,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
