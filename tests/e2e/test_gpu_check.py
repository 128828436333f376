"""The command for somebody with a GPU: its whole flow, in Triton's interpreter, on tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_SCRIPT = Path(__file__).parent.parent.parent / "loadtest" / "bench" / "gpu_check.py"


def test_the_whole_flow_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(_SCRIPT), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").glob("gpu-check-interpreter-*.json")
    report = json.loads(file.read_text())
    assert report["failures"] == []
    assert all(check["ok"] for check in report["checks"])
    parts = {check["part"] for check in report["checks"]}
    kinds = [f"{part}, {dtype}" for part in ("products", "layers", "attention") for dtype in ("float32", "bfloat16")]
    assert parts == {"engine", *kinds}
    assert "never run on a GPU" in report["environment"]["provider"]
    assert {row["graphs"] for row in report["speed"] if "graphs" in row} == {True, False}
    kinds = {"float32", "bfloat16", "int8", "float8_e4m3fn"}
    assert {row["cache"] for row in report["speed"] if "cache" in row} == kinds - {"float32"}
    for part, of in {
        "engine": {"float32"},
        "layers, bfloat16": {"bfloat16"},
        "attention, float32": {"float32"},
    }.items():
        words = " ".join(check["what"] for check in report["checks"] if check["part"] == part)
        assert {kind for kind in kinds if kind in words} == {"int8", "float8_e4m3fn"} | of
    assert {row["adapters"] for row in report["speed"] if "adapters" in row} == {1}
    table = file.with_suffix(".md").read_text()
    assert "0 wrong, 0 parts that raised" in table
    assert "Nothing here was timed on a GPU" in table
