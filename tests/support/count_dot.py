"""What the machine code of `nf4_dot` costs, and the proof of what pack=2 groups in it.

Run as a script without TRITON_INTERPRET, it compiles the cases that it is given the numbers of and prints JSON;
tests/kernels/test_nf4_dot_code.py starts it.
"""

import json
import sys
from typing import Any

from guanaco.kernels import nf4_dot, sass
from guanaco.kernels.pack_proof import ungrouped
from guanaco.kernels.triton_compile import CompileCase, compile_case, count, tools


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
        "8 rows of odd k": nf4_dot.dot_case(target, 8, 1536, 576),
        "float32 scales": nf4_dot.dot_case(target, 16, 4096, 4096, double_quant=False),
        "finish": nf4_dot.finish_case(8, 4096, 4),
        "finish with adapters": nf4_dot.finish_case(8, 4096, 4, adapters=8),
        "finish 16": nf4_dot.finish_case(16, 22016, 2, epilogue="silu_mul", adapters=8, parts=2),
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
