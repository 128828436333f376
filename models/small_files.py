"""Files of a model directory that are read whole: each with a size above which it is refused before it is read.

Knows nothing of what is in them. Called by the readers of configs, tokenizers and templates.
"""

import os
import stat
from pathlib import Path

MAX_TEMPLATE_FILE_BYTES = 4 << 20


def read_small(path: Path, max_bytes: int) -> bytes:
    """The whole of a regular file. Raises OSError; its `strerror` says where the file is no such file, or too large."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no regular file", str(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(0, f"it is larger than {max_bytes} bytes, which no such file needs", str(path))
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to would be waited for
