"""Folders that are filled under a hidden name, and what a killed process left of them.

Whoever fills one holds its lock, which the kernel frees when the process ends, however it ends: a folder without a
holder is a leftover. Standard library only. Used by whatever writes a model or an adapter in one piece.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

_SECONDS_UNTIL_HELD = 60.0  # a folder is made a moment before it is held


class PartialFolder:
    """The new folder `path` beside `target`, hidden and held until `close`. Raises OSError."""

    def __init__(self, target: Path) -> None:
        """Makes the target's parent, if need be, and removes leftovers of the same target."""
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        self.path = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        self._handle: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove what is still there under the hidden name, and let go. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def remove_leftovers(target: Path) -> None:
    """Remove the folders that processes left that were killed while they wrote `target`."""
    pattern = re.compile(re.escape(_prefix(target)) + "[a-z0-9_]{8}")
    for path in target.parent.glob(".*.partial-*"):
        if pattern.fullmatch(path.name) and not path.is_symlink() and _is_left(path):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _is_left(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_mtime < time.time() - _SECONDS_UNTIL_HELD
    except OSError:  # somebody holds it
        return False
    finally:
        os.close(handle)
