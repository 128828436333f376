#!/usr/bin/env python3
"""Run every test and every long proof with its full count, and write the result with its conditions.

make accept          (or: .venv/bin/python loadtest/accept.py --out loadtest/results --workers 2)
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from guanaco.server.bootstrap.machine import look

ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _machine() -> str:
    machine = look()
    memory = f"{machine.memory_bytes / 2**30:.1f} GiB"
    return f"{machine.cpu_name}, {machine.cpu_count} CPUs, {memory}, Python {platform.python_version()}"


def _latency_under_attack(path: Path) -> object:
    """Percentiles in milliseconds; None if they could not be measured, which is no failure."""
    script = str(ROOT / "loadtest/latency_under_attack.py")
    code = subprocess.run([sys.executable, script, "--out", str(path)], cwd=ROOT, check=False).returncode
    return json.loads(path.read_text()) if code == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "loadtest/results")
    parser.add_argument("--workers", type=int, default=2, help="processes that run the tests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        junit, proofs = Path(folder, "junit.xml"), Path(folder, "proofs.json")
        command = [
            str(Path(sys.executable).parent / "pytest"),
            "--accept",
            f"--numprocesses={args.workers}",
            "--timeout=3600",
            f"--junitxml={junit}",
            f"--proofs={proofs}",
        ]
        started = datetime.datetime.now(datetime.UTC)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
        counts = json.loads(proofs.read_text())
        latency = _latency_under_attack(Path(folder, "latency.json"))
    bad = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    result = {
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds()),
        "command": "make accept",
        "workers": args.workers,
        "commit": _git("rev-parse", "HEAD") + (" + uncommitted changes" if _git("status", "--porcelain") else ""),
        "machine": _machine(),
        "tests": len(cases),
        "failed": bad,
        "skipped": [f"{c.get('classname')}::{c.get('name')}" for c in cases if c.find("skipped") is not None],
        "proof_counts": counts,
        "latency_under_attack": latency,
        "measured": {p.get("name"): p.get("value") for case in cases for p in case.iter("property")},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"accept-{started.date()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path}: {len(cases)} tests, {len(bad)} failed, {len(counts)} long proofs")
    return code


if __name__ == "__main__":
    sys.exit(main())
