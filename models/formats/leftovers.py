"""Folders that are filled under a hidden name, and the removal of those that a killed process left.

The process that fills a folder holds its lock, which the kernel frees when the process ends in any way: a folder whose
lock is free is a leftover. Standard library only. Used by all code that writes a model or an adapter as a whole.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

_SECONDS_UNTIL_HELD = 60.0  # a younger folder may only just have been made, and not be locked yet


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
        """Remove what is left under the hidden name, and free the lock. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def remove_leftovers(target: Path) -> None:
    """Remove the folders of processes that were killed while they wrote `target`."""
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
    except OSError:  # a process holds it
        return False
    finally:
        os.close(handle)
