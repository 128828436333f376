"""Weights in a provider's own form, kept on disk and mapped into memory: the second start repacks nothing.

An entry of the model cache: `weights.bin`, each tensor on a page of its own, and a manifest that names them with their
SHA-256. The file may be mapped because only this program writes it: it appears complete under its name, is never
changed again, and is unlinked when it is pruned. Knows files, not models. Called by `loader`.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from guanaco.kernels.ops import PackedWeight
from guanaco.models.errors import ModelError
from guanaco.models.formats.strict_json import read_json
from guanaco.models.loading.model_cache import FORMAT, MANIFEST, ModelCache

WEIGHTS = "weights.bin"
_PAGE_BYTES = 4096


def packed_key(source_key: str, packed_format: str) -> str:
    """The cache's key of a source's weights in one provider's form."""
    return hashlib.sha256(f"{source_key} {packed_format}".encode()).hexdigest()


class PackedWriter:
    """Writes one entry; it appears complete or not at all. Every method may raise OSError. Needs the exclusive lock."""

    def __init__(self, cache: ModelCache, key: str) -> None:
        cache.remove(key)
        self._path = cache.root / key
        self._directory = Path(tempfile.mkdtemp(prefix=f".{key}.partial-", dir=cache.root))
        self._file = (self._directory / WEIGHTS).open("wb")
        self._tensors: dict[str, dict[str, Any]] = {}

    @property
    def num_tensors(self) -> int:
        return len(self._tensors)

    def add(self, name: str, packed: PackedWeight) -> None:
        self._file.write(bytes(-self._file.tell() % _PAGE_BYTES))
        data: Any = packed.data.numpy()
        self._tensors[name] = {
            "offset": self._file.tell(),
            "bytes": packed.data.numel(),
            "shape": list(packed.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        self._file.write(data)

    def seal(self, *, source: Path, fingerprint: str, notes: Collection[str]) -> None:
        """Add the manifest and give the entry its name: from here on it can be found."""
        # Not synced to the disk, which would take longer than quantising: a reader recognises what a power cut left.
        self._file.close()
        manifest = {
            "format": FORMAT,
            "source": f"{source} (packed for the processor)",
            "fingerprint": fingerprint,
            "notes": list(notes),
            "tensors": self._tensors,
        }
        (self._directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        self._directory.chmod(0o755)  # mkdtemp's mode is for secrets
        self._directory.rename(self._path)

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class PackedWeights:
    """An entry's weights, each checked against its SHA-256."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError if the entry is not byte for byte as it was written."""
        try:
            with (path / WEIGHTS).open("rb") as file:
                # Private and writable, because torch has no read-only tensors. Nothing writes to them.
                self._pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            tensors: dict[str, dict[str, Any]] = read_json(path / MANIFEST)["tensors"]
            whole = torch.frombuffer(self._pages, dtype=torch.uint8)
            self._weights = {
                name: PackedWeight(whole[t["offset"] : t["offset"] + t["bytes"]], (t["shape"][0], t["shape"][1]))
                for name, t in tensors.items()
            }
            hashes = {name: t["sha256"] for name, t in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            found = pool.map(_sha256, self._weights.values())
            bad = [name for name, digest in zip(self._weights, found, strict=True) if digest != hashes[name]]
        if bad:
            raise ModelError(f"{path} is damaged: {bad[0]} has changed since it was written")

    def get(self, name: str, shape: tuple[int, int]) -> PackedWeight | None:
        """The weight called `name`; None if it was not packed."""
        packed = self._weights.get(name)
        return packed if packed is not None and packed.shape == shape else None


def _sha256(packed: PackedWeight) -> str:
    data: Any = packed.data.numpy()
    return hashlib.sha256(data).hexdigest()
