"""Files of a model directory that are read as a whole. A file above its size limit is refused before it is read.

Called by the readers of configs, tokenizers and templates.
"""

import os
import stat
from pathlib import Path

from guanaco.models.formats.git_lfs import POINTER_PROBLEM, is_lfs_pointer

# Several times the size of the largest files in use. JSON takes up to 25 times its size as Python's values.
MAX_JSON_BYTES = 16 << 20  # tokenizer_config.json of a vocabulary with many added tokens: 2 MB
MAX_TEMPLATE_FILE_BYTES = 4 << 20
MAX_SENTENCEPIECE_BYTES = 64 << 20  # 256,000 pieces: 4 MB
MAX_TOKENIZER_BYTES = 128 << 20  # 256,000 pieces with their merges: 33 MB


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError; its `strerror` also says if the file is not regular, too large, or
    a Git LFS pointer."""
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is no regular file", str(path))
        data = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    if status.st_size > max_bytes or len(data) > max_bytes:
        raise OSError(0, f"it is larger than {_shown(max_bytes)}, which no such file needs", str(path))
    if is_lfs_pointer(data):
        raise OSError(0, f"it is {POINTER_PROBLEM}", str(path))
    return data


def _shown(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe without a writer would block
