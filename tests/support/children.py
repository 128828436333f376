"""Python processes that tests start: they can import `support`, and none of the repository's bare folder names."""

import os
from pathlib import Path

IMPORTABLE = Path(__file__).resolve().parents[1] / "importable"


def environment(**more: str) -> dict[str, str]:
    """This process's environment variables, with `support` importable, and `more`."""
    return {**os.environ, "PYTHONPATH": str(IMPORTABLE), **more}
