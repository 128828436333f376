"""The cache of loaded models: `<cache>/models/<key>/` has a manifest, and an NF4 checkpoint or packed weights.

The key identifies the source's content; the manifest's fingerprint identifies the result's. A reader checks the
content while it loads, so a damaged copy is never served. `packed_cache` writes and reads the packed weights. Knows
files, not models. Called by `loader` and `guanaco models`.
"""

import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from guanaco.models.architectures.config import ModelConfig
from guanaco.models.errors import ModelError
from guanaco.models.formats.raw_file import FileLayout, RawFile
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.quantize import Nf4CheckpointWriter

T = TypeVar("T")

# Part of every key. Raise the number when the same source is quantised to other bytes.
FORMAT = "guanaco nf4 cache 1"
MANIFEST = "manifest.json"
# A shard is written when it has this many bytes, so that little more than the model itself is in memory.
SHARD_BYTES = 256 << 20
_SAMPLE_BYTES = 4096
_LEFTOVER = re.compile(r"\.([0-9a-f]{64})\.(?:partial-[a-z0-9_]{8}|manifest)")


@dataclass(frozen=True)
class CachedModel:
    """One entry of the cache."""

    key: str
    path: Path
    source: str  # the path of the dense model when it was quantised
    fingerprint: str  # of the quantised model; empty if the manifest can't be read, and then the entry is rebuilt
    notes: tuple[str, ...]  # the notes of loading the source
    num_bytes: int
    last_used_seconds: float  # seconds since the epoch


def source_key(config: ModelConfig, layouts: list[FileLayout], *, keep_float32: bool = False) -> str:
    """The key by which a dense model is recognised: a hex SHA-256, made from a few kB per tensor instead of all bytes.

    For each file: name, size, time of change, table of tensors, and 4 KiB from the start, the middle and the end of
    each tensor. Any ordinary rewrite changes it. It does not notice a few bytes changed in the middle of a tensor if
    the file's time was put back. keep_float32: part of the key, since the result then keeps float32 tensors.
    """
    digest = hashlib.sha256(FORMAT.encode())
    digest.update(json.dumps(config.computation(), sort_keys=True).encode())
    if keep_float32:
        digest.update(b" float32 kept")
    for layout in layouts:
        status = layout.path.stat()
        digest.update(repr((layout.path.name, status.st_size, status.st_mtime_ns)).encode())
        digest.update(layout.table)
        file = RawFile(layout.path)
        try:
            for offset, num_bytes in layout.spans:
                size = min(_SAMPLE_BYTES, num_bytes)
                for start in (0, (num_bytes - size) // 2, num_bytes - size):
                    digest.update(file.read_bytes(offset + start, size))
        finally:
            file.close()
    return digest.hexdigest()


class ModelCache:
    """The entries below one cache directory. Every method may raise OSError where the directory cannot be used."""

    def __init__(self, cache_dir: Path) -> None:
        self.root = cache_dir / "models"

    @contextmanager
    def lock(
        self, key: str, *, exclusive: bool, wait: bool = True, on_wait: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Hold the entry against other processes: many readers, or one that builds or removes it.

        If another process holds it, on_wait is called before waiting; with `wait` False, BlockingIOError is raised. The
        kernel frees the lock of a process that dies.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f".{key}.lock").open("w") as file:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if on_wait is not None:
                    on_wait()
                fcntl.flock(file, mode)
            yield

    def ensure(
        self,
        key: str,
        *,
        read: Callable[[CachedModel], T | None],
        make: Callable[[], T],
        on_wait: Callable[[], object] | None = None,
    ) -> tuple[T, CachedModel | None]:
        """Return the result of `read` for the entry `key`. If the entry is missing or damaged, return that of `make`,
        which writes the entry if it can.

        `read` returns None for a damaged entry. It runs under the shared lock, so that several processes can read at
        once; `make` runs under the exclusive lock. The second result is the damaged entry that `make` replaced, if any.
        """
        with self.lock(key, exclusive=False, on_wait=on_wait):
            entry = self.find(key)
            if entry is not None and (found := read(entry)) is not None:
                return found, None
        with self.lock(key, exclusive=True, on_wait=on_wait):
            entry = self.find(key)  # between the two locks another process may have made it
            if entry is not None and (found := read(entry)) is not None:
                return found, None
            return make(), entry

    def find(self, key: str) -> CachedModel | None:
        """The entry called `key`, if there is one."""
        path = self.root / key
        return _describe(path) if path.is_dir() else None

    def touch(self, entry: CachedModel) -> None:
        """Record that the entry was used now."""
        with suppress(OSError):
            (entry.path / MANIFEST).touch()

    def writer(self, key: str, config: dict[str, Any]) -> Nf4CheckpointWriter:
        """A writer of the entry `key`. Deletes what a killed process left of it. Needs the exclusive lock.

        It does not wait for the disk, which would take longer than quantising: a reader recognises by the fingerprint
        what a power cut has damaged, and the entry is made again.
        """
        self.remove(key)
        return Nf4CheckpointWriter(self.root / key, config, max_shard_bytes=SHARD_BYTES, is_durable=False)

    def seal(self, writer: Nf4CheckpointWriter, *, source: Path, fingerprint: str, notes: Collection[str]) -> None:
        """Add the manifest and give the entry its name: from here on it can be found."""
        manifest = {"format": FORMAT, "source": str(source), "fingerprint": fingerprint, "notes": list(notes)}
        directory = self.root / f".{writer.dst.name}.manifest"
        directory.mkdir(exist_ok=True)
        try:
            (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            writer.copy_file(directory / MANIFEST)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        writer.close()

    def remove_leftovers(self) -> None:
        """Delete unfinished entries of killed processes.

        A process that still writes an entry holds its lock, so an unfinished entry with a free lock is a leftover.
        """
        names = [path.name for path in self.root.glob(".*")] if self.root.is_dir() else []
        for key in {found.group(1) for name in names if (found := _LEFTOVER.fullmatch(name)) is not None}:
            with suppress(OSError), self.lock(key, exclusive=True, wait=False):
                for path in (*self.root.glob(f".{key}.partial-*"), self.root / f".{key}.manifest"):
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self, key: str) -> None:
        """Delete the entry and unfinished copies of it. Needs the exclusive lock."""
        for path in (self.root / key, *self.root.glob(f".{key}.partial-*")):
            with suppress(FileNotFoundError):
                shutil.rmtree(path)

    def entries(self) -> list[CachedModel]:
        """All entries, the most recently used first."""
        if not self.root.is_dir():
            return []
        found = [_describe(path) for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return sorted(found, key=lambda entry: (-entry.last_used_seconds, entry.key))


def list_cached_models(cache_dir: Path) -> list[CachedModel]:
    """All entries of the cache, NF4 checkpoints and packed weights, the most recently used first."""
    return ModelCache(cache_dir).entries()


def prune_cached_models(
    cache_dir: Path, keys: Collection[str] | None = None, *, unused_for_seconds: float = 0.0
) -> tuple[list[CachedModel], list[CachedModel]]:
    """Delete entries that were not used for `unused_for_seconds`: all, or those in `keys`.

    Returns (deleted entries, entries that stay because a process uses them). The source of a deleted entry is quantised
    again when it is next served. Raises ModelError for an unknown key.
    """
    cache = ModelCache(cache_dir)
    entries = cache.entries()
    unknown = sorted(set(keys or ()) - {entry.key for entry in entries})
    if unknown:
        raise ModelError(f"no cached model is called {unknown[0]}: `guanaco models list` shows those that are there")
    deleted: list[CachedModel] = []
    busy: list[CachedModel] = []
    latest = time.time() - unused_for_seconds
    for entry in entries:
        if (keys is None or entry.key in keys) and entry.last_used_seconds <= latest:
            try:
                with cache.lock(entry.key, exclusive=True, wait=False):
                    cache.remove(entry.key)
                deleted.append(entry)
            except BlockingIOError:
                busy.append(entry)
    return deleted, busy


def _describe(path: Path) -> CachedModel:
    files = [file.stat() for file in path.iterdir()]
    try:
        manifest = read_json(path / MANIFEST)
        known = manifest.get("format") == FORMAT
        last_used = (path / MANIFEST).stat().st_mtime
    except (ModelError, OSError):
        manifest, known, last_used = {}, False, path.stat().st_mtime
    return CachedModel(
        key=path.name,
        path=path,
        source=str(manifest.get("source", "")),
        fingerprint=str(manifest.get("fingerprint", "")) if known else "",
        notes=tuple(map(str, manifest.get("notes", ()))),
        num_bytes=sum(status.st_size for status in files),
        last_used_seconds=last_used,
    )
