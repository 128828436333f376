"""Compiles the cases of kernel files for targets that are not here and prints what was counted, as one JSON list.

Run as a script, without TRITON_INTERPRET, on MODULE:TARGET arguments such as elementwise:sm_80 (a module of
guanaco.kernels), or MODULE:TARGET:TEXT for the cases whose config begins with TEXT; the tests of machine code start it
by way of `counts`.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from compiling import run_compiling


def counts(wanted: list[str], folder: Path) -> list[dict[str, Any]]:
    """kernel, target, config, rows and all numbers of `triton_compile.Analysis` of every case that was asked for."""
    process = run_compiling([str(Path(__file__)), *wanted], folder)
    assert process.returncode == 0, process.stderr
    found: list[dict[str, Any]] = json.loads(process.stdout)
    return found


def main(wanted: list[str]) -> None:
    from guanaco.kernels.triton_compile import analyse

    found = []
    for name, target, *text in (w.split(":") for w in wanted):
        module = importlib.import_module(f"guanaco.kernels.{name}")
        cases = [case for case in module.compile_cases(target) if case.config.startswith(tuple(text or [""]))]
        for case in (case for case in cases if target in case.targets):
            numbers = {k: v for k, v in vars(analyse(case, target)).items() if isinstance(v, int | float)}
            found.append({"kernel": case.kernel, "target": target, "config": case.config, "rows": case.rows, **numbers})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
