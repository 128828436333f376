"""Compiles what the `triton` provider launches on targets that are not here, and prints what was counted, as JSON.

Run as a script, without TRITON_INTERPRET, on TARGET:PATTERN arguments; a pattern is a regular expression for the whole
of "kernel rows config", such as `nf4_dot 16 .*`. TARGET:lora counts one product with and without adapters. The tests
of machine code start it by way of `counts`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from support.kernels.compiling import run_compiling

LORA_SIDE, LORA_ROWS, LORA_ADAPTERS, LORA_RANK = 4096, 8, 8, 16


def counts(wanted: list[str], folder: Path, *, timeout: int = 280) -> list[dict[str, Any]]:
    """One entry for each launch that fits, with all numbers of `triton_compile.Analysis`."""
    process = run_compiling(["-m", "support.kernels.compiled_counts", *wanted], folder, timeout=timeout)
    assert process.returncode == 0, process.stderr
    found: list[dict[str, Any]] = json.loads(process.stdout)
    return found


_compiled: dict[str, Any] = {}  # one launch may be in several of the wanted lists


def _count(case: Any, target: str) -> dict[str, Any]:
    from guanaco.kernels.analysis.compile import compile_case, count_compiled
    from guanaco.kernels.triton.products.pack_proof import ungrouped

    options = (case.num_warps, case.num_stages, sorted(case.not_divisible))
    key = f"{target} {case.kernel} {sorted(case.signature.items())} {sorted(case.constexprs.items())} {options}"
    compiled = _compiled.setdefault(key, None) or compile_case(case, target)
    _compiled[key] = compiled
    found = count_compiled(case, target, compiled)
    return {
        "kernel": case.kernel,
        "target": target,
        "config": case.config,
        "rows": case.rows,
        "constants": dict(case.constexprs),
        "types": dict(case.signature),
        "has_loop": case.has_loop,
        **{k: v for k, v in vars(found).items() if isinstance(v, int | float)},
        "slots": found.kernel_slots_per_unit * case.units,
        "ungrouped": ungrouped(compiled.ptx) if case.kernel == "nf4_dot" else [],
    }


def _lora(target: str) -> list[dict[str, Any]]:
    """The launches of a square product of a few rows, alone and with as many adapters: entries `part` base and lora."""
    from guanaco.kernels.analysis.cards import hardest_card
    from guanaco.kernels.analysis.launches import product_launches
    from guanaco.kernels.analysis.work import case_of

    found = []
    for part, adapters in (("base", 0), ("lora", LORA_ADAPTERS)):
        launched = product_launches(
            target, hardest_card(target).multiprocessors, LORA_SIDE, LORA_ROWS, adapters, LORA_RANK
        )
        found += [{"part": part, **_count(case_of(launch), target)} for launch in launched]
    return found


def main(wanted: list[str]) -> None:
    from guanaco.server.commands.bench.kernels import collect_cases

    found = []
    for target, _, pattern in (w.partition(":") for w in wanted):
        if pattern == "lora":
            found += _lora(target)
            continue
        cases = [c for c in collect_cases(target) if re.fullmatch(pattern, f"{c.kernel} {c.rows} {c.config}")]
        assert cases, f"nothing that is launched on {target} fits {pattern}"
        found += [_count(case, target) for case in cases]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
