"""The folder of a comparison. It keeps answers and verdicts as they come, so that none is generated or judged twice.

Each record is one line of JSON; its key is the digest of everything that decided it. A killed run leaves at most one
torn line, which the next run cuts off. Reports are replaced in one step.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any, Self

from guanaco.server.errors import CommandError

FORMAT = 1  # a part of every digest, so a new number makes all earlier records unused


def digest(*parts: Any) -> str:
    """A digest of values that JSON can hold; equal values give equal digests."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Records:
    """One file of records: digest → record. All are in memory, and on disk after every `put`.

    Raises CommandError for a file with a line that is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] = path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # a run was killed while it wrote this line
            try:
                entry = json.loads(line)
                self._kept[entry["key"]] = entry["record"]
            except (ValueError, KeyError, TypeError):
                raise CommandError(
                    f"{path}, line {number}: not a record of guanaco compare: move the file away"
                ) from None
            end += len(line)
        self._file.truncate(end)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a digest, or None."""
        return self._kept.get(key)

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record, on disk at once."""
        self._file.write(json.dumps({"key": key, "record": record}, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        self._kept[key] = record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WorkFolder:
    """The folder of one comparison: `with WorkFolder(path) as folder:`. One process at a time may use it.

    Raises CommandError if another process uses it, or if it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(
                f"{path}: another guanaco compare is at work there: wait, or pass another --out"
            ) from None
        except OSError as error:
            raise CommandError(f"--out {path}: cannot be used ({error.strerror})") from None
        self.answers = Records(path / "answers.jsonl")
        self.verdicts = Records(path / "judgements.jsonl")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.close()
        self.verdicts.close()
        self._lock.close()

    def write(self, name: str, text: str) -> Path:
        """Write a file of the report in one step, and return its path."""
        target, part = self.path / name, self.path / f".{name}.part"
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, target)
        return target
