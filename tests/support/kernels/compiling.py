"""Processes that compile kernels: like this one, but without Triton's interpreter, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

from support.children import IMPORTABLE

TIMEOUT_SECONDS = 280


def run_compiling(
    arguments: list[str], folder: Path, *, timeout: int = TIMEOUT_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run Python on a script (or `-m module`) with the interpreter off; whatever is cached stays in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(IMPORTABLE)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,  # never the repository: its bare folder names would be importable
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


GUANACO = ["-c", "import sys; from guanaco.server.commands.main import main; sys.argv[0] = 'guanaco'; main()"]
