#!/usr/bin/env python3
"""Run the acceptance rows about load, the adapters' hub and faults (loadtest/README.md), and print their results.

    .venv/bin/python loadtest/rows.py                      # all of them with their full counts; half an hour
    .venv/bin/python loadtest/rows.py L1 L4 --out FILE     # some
    .venv/bin/python loadtest/rows.py L4 seconds=10        # with an argument of its own

The exit code is 1 if anything was lost, wrong or left behind. Times are only listed beside their targets: they mean
something only on an otherwise idle machine.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "importable"))

from guanaco.server.bootstrap.machine import look  # noqa: E402
from support.load import rows_of_faults, rows_of_hub, rows_of_load  # noqa: E402

ROWS = {
    "L1": rows_of_load.streams_at_once,
    "L2": rows_of_faults.real_engine,
    "L3": rows_of_load.idle_connections,
    "L4": rows_of_load.overload,
    "L5": rows_of_load.ramp_and_bursts,
    "L6": rows_of_faults.soak,
    "L7": rows_of_load.cancellations,
    "L8": rows_of_faults.scheduling,
    "L9": rows_of_load.freeze,
    "A6": rows_of_hub.hub_faults,
    "F-i": rows_of_faults.clock,
    "F-l": rows_of_faults.fairness,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="ROW | NAME=NUMBER", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help="write the findings there, as JSON")
    args = parser.parse_args()
    chosen = [word for word in args.words if "=" not in word] or list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        parser.error(f"{unknown[0]}: there are {', '.join(ROWS)}")
    options: dict[str, Any] = {n: json.loads(v) for n, _, v in (w.partition("=") for w in args.words if "=" in w)}
    findings = []
    for name in chosen:
        finding = ROWS[name](**options)
        findings.append(finding.told())
        verdict = "; ".join(finding.problems) or "holds"
        print(f"{name}: {verdict}\n  {finding.counts}\n  {finding.times}", flush=True)
        for missed in finding.missed:
            print(f"  beyond its target: {missed}", flush=True)
    if args.out is not None:
        conditions = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "loadtest/rows.py " + " ".join(sys.argv[1:]),
            "machine": f"{look().cpu_name}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}",
            "load average at the end": os.getloadavg()[0],
        }
        args.out.write_text(json.dumps({**conditions, "rows": findings}, indent=1) + "\n")
    return 1 if any(finding["problems"] for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
