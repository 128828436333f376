"""What the machine code of `nf4_dot` costs, and the proof of what pack=2 groups in it.

Run as a script without TRITON_INTERPRET, it compiles the cases that it is given the numbers of and prints JSON;
tests/kernels/test_nf4_dot_code.py starts it.
"""

import json
import re
import sys
from typing import Any

from guanaco.kernels import nf4_dot, sass
from guanaco.kernels.triton_compile import CompileCase, compile_case, count, tools

_PAIR = re.compile(r"// pair (%r\d+) (%r\d+) to (%r\d+) (%r\d+) (%r\d+) (%r\d+)")
_PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\S*\s+\{[^}]*\}, \{([^}]*)\}")


def ungrouped(ptx: str) -> list[str]:
    """What speaks against pack=2 taking the two halves of one word, in the order of the products' k. Empty: nothing.

    The decode says in a comment which registers it got and filled. Both inputs must be one register: the two elements
    are then the two places of one word. All four registers of a product's left operand must come from the same output
    of four decodes, untouched: their lower half is the even k (PTX ISA, m16n8k16), so the first element is the first
    place; Triton would have had to swap the halves otherwise.
    """
    wrong = []
    outputs: dict[str, int] = {}
    for first, second, *filled in _PAIR.findall(ptx):
        if first != second:
            wrong.append(f"a pair of two words: {first} {second}")
        for index, register in enumerate(filled):
            if register in outputs:
                wrong.append(f"{register} is filled twice")
            outputs[register] = index
    products = [[r.strip() for r in operand.split(",")] for operand in _PRODUCT.findall(ptx)]
    if not outputs or not products:
        wrong.append(f"{len(outputs)} decoded registers, {len(products)} products")
    for operand in products:
        if len(operand) != 4 or len({outputs.get(r, r) for r in operand}) != 1 or operand[0] not in outputs:
            wrong.append(f"a left operand that is not decoded as it stands: {operand}")
    used = {r for operand in products for r in operand}
    return wrong + [f"{r} is decoded for nothing" for r in outputs.keys() - used]


def counts(case: CompileCase, target: str) -> dict[str, Any]:
    compiled = compile_case(case, target)
    functions, resources = sass.disassemble(compiled.cubin, tools())
    name = next(n for n in functions if case.function.__name__ in n)
    found = count(case, target, functions[name], resources[name], compiled.shared_bytes)
    return {
        **{k: v for k, v in vars(found).items() if isinstance(v, int | float)},
        "ungrouped": ungrouped(compiled.ptx) if case.kernel == "nf4_dot" else [],
        "wide_bytes": found.loop.bytes_by_width()[16] if found.loop else 0,
        "weight_bytes": case.bytes_per_unit * case.units_per_iteration * found.unrolled / (32 * case.num_warps),
        "slots": found.kernel_slots_per_unit * case.units,
    }


def cases(target: str) -> dict[str, CompileCase]:
    """Those that are looked at more closely, by name."""
    return {
        **{str(rows): nf4_dot.dot_case(target, rows, 4096, 4096) for rows in (8, 16, 32, 64)},
        "odd k": nf4_dot.dot_case(target, 16, 1536, 576),
        "float32 scales": nf4_dot.dot_case(target, 16, 4096, 4096, double_quant=False),
        "finish": nf4_dot.finish_case(8, 4096, 4),
        "finish with adapters": nf4_dot.finish_case(8, 4096, 4, adapters=8),
        "finish gate and up": nf4_dot.finish_case(64, 22016, 2, epilogue="silu_mul", adapters=8, parts=2),
    }


def main(wanted: list[str]) -> None:
    """`wanted`: such as sm_80:16."""
    found = {}
    for target, name in (w.split(":") for w in wanted):
        found[f"{target}:{name}"] = counts(cases(target)[name], target)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
