"""The native threads on a machine whose cores other programs use: who waits how.

Nothing is timed: a thread without a core is played by a task that sleeps.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "kernels" / "cpu" / "native"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases, compiled with the pool's own source."""
    compiler = shutil.which("g++")
    assert compiler is not None, "installing guanaco with its native kernels needed a g++, too"
    target = tmp_path_factory.mktemp("pool") / "cases"
    sources = (HERE / "thread_pool_cases.cpp", NATIVE / "thread_pool.cpp")
    subprocess.run([compiler, "-std=c++17", "-Wall", "-pthread", f"-I{NATIVE}", *sources, "-o", target], check=True)
    return target


def run(program: Path, case: str, lines: str = "") -> str:
    return subprocess.run([program, case], input=lines, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_caller_sleeps_while_a_thread_has_no_core(program: Path) -> None:
    """It would hold the very core that the thread could have."""
    assert run(program, "sleeps") == "1\n"


def test_every_task_runs_once_whoever_sleeps(program: Path) -> None:
    assert run(program, "all_tasks") == "0\n"


def test_threads_that_cannot_be_started_are_an_error_not_an_abort() -> None:
    code = (
        "import resource; from guanaco.kernels.cpu.library import Context; Context('auto', 2)\n"
        "used = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), -1))\n"
        "try: Context('auto', 1000)\n"
        "except MemoryError as error: print(error)\n"
        "Context('auto', 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "the native kernels could not start 1000 threads\n"), done.stderr
