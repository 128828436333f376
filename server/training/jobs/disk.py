"""Small files that survive a crash: JSON written whole or not at all, lists that grow line by line, and ids.

Knows nothing of their content. Only the server's own user can read the files.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_MAX_JSON_BYTES = 4 << 20


def new_id(prefix: str) -> str:
    """A new id that nobody can guess: PREFIX-, then 24 hex digits."""
    return f"{prefix}-{secrets.token_hex(12)}"


def is_id(text: str, prefix: str) -> bool:
    """Whether a text is an id of `new_id`. Only such a text may become part of a path."""
    return re.fullmatch(rf"{prefix}-[0-9a-f]{{24}}", text) is not None


def make_directory(path: Path) -> None:
    """Make a directory and its parents, for this user alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by a JSON object, as `replace_file` does."""
    replace_file(path, json.dumps(content).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file's content, and sync it to the disk. Raises OSError; then the old file is still there."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that `write_json` wrote; None if the file is absent, unreadable or holds anything else."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one JSON object as a line, and sync it. If a crash cut the last line, a line end comes first. Raises
    OSError."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(handle).st_size
        start = b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""
        os.write(handle, start + json.dumps(content).encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The objects in the lines of a file, from byte `offset` on. Cut or damaged lines are left out."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                try:
                    content = json.loads(line)
                except ValueError:
                    continue
                if isinstance(content, dict):
                    yield content
    except OSError:
        return


def sync_directory(path: Path) -> None:
    """Sync a directory, so that new and renamed files survive a crash. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
