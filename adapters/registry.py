"""Names → immutable adapter versions, and the host copy of each version.

Reads come from the event loop (names) and the engine thread (versions) at any time: both see one consistent snapshot
without a lock. Writes are whole-snapshot swaps under one. Knows nothing of slots, requests or HTTP.
"""

import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from guanaco.adapters.errors import AdapterError, printable
from guanaco.adapters.weights import AdapterLimits, LoadedAdapter, load_adapter

# One path segment without tricks: it becomes a model id, a URL part, a metrics label and a sub-folder's name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class AdapterEntry:
    """What a name stands for at one moment; replacing an adapter makes a new entry."""

    name: str
    version: str
    source: str  # the path it was read from, as the operator wrote it
    loaded_at: float  # seconds since the epoch
    max_rank: int
    num_bytes: int
    modules_applied: int
    modules_possible: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Snapshot:
    entries: MappingProxyType[str, AdapterEntry]
    versions: MappingProxyType[str, LoadedAdapter]


class AdapterRegistry:
    """The adapters of one base model. `targets` and `base_name` are the base's; no adapter may take its name."""

    def __init__(
        self,
        targets: dict[str, tuple[int, int]],
        *,
        base_names: tuple[str, ...],
        limits: AdapterLimits | None = None,
        strict: bool = False,
    ) -> None:
        self._targets = dict(targets)
        self._base_names = frozenset(base_names)
        self._limits = limits or AdapterLimits()
        self._strict = strict
        self._lock = threading.Lock()
        self._snapshot = _Snapshot(MappingProxyType({}), MappingProxyType({}))

    def load(self, name: str, path: Path) -> AdapterEntry:
        """Read, check and publish the adapter at `path` under `name`. Takes as long as the reading does.

        Raises AdapterError for a bad or taken name, and for everything `load_adapter` refuses; then nothing changes.
        """
        self._check_free(name)
        adapter = load_adapter(path, self._targets, name=name, limits=self._limits, strict=self._strict)
        entry = AdapterEntry(
            name=name,
            version=adapter.version,
            source=str(path),
            loaded_at=time.time(),
            max_rank=adapter.max_rank,
            num_bytes=adapter.num_bytes,
            modules_applied=adapter.modules_applied,
            modules_possible=adapter.modules_possible,
            notes=adapter.notes,
        )
        with self._lock:
            self._check_free(name)
            versions = dict(self._snapshot.versions)
            versions.setdefault(adapter.version, adapter)  # the same content under two names is kept once
            entries = {**self._snapshot.entries, name: entry}
            self._snapshot = _Snapshot(MappingProxyType(entries), MappingProxyType(versions))
        return entry

    def resolve(self, name: str) -> AdapterEntry | None:
        """What `name` stands for now; None for a name that is not registered."""
        return self._snapshot.entries.get(name)

    def entries(self) -> tuple[AdapterEntry, ...]:
        """Every adapter, in the order of registration."""
        return tuple(self._snapshot.entries.values())

    def host_copy(self, version: str) -> LoadedAdapter:
        """The tensors of a version that `resolve` has handed out."""
        return self._snapshot.versions[version]

    @property
    def num_bytes(self) -> int:
        """Bytes of all host copies, each version counted once."""
        return sum(adapter.num_bytes for adapter in self._snapshot.versions.values())

    def _check_free(self, name: str) -> None:
        check_name(name)
        if name in self._base_names:
            problem = f"{name} is the base model's name; give the adapter another one, or set --served-model-name"
            raise AdapterError("name_taken", problem, "name")
        if name in self._snapshot.entries:
            raise AdapterError("name_taken", f"an adapter called {name} is there already; choose another name", "name")


def check_name(name: str) -> None:
    """Raises AdapterError unless `name` may be an adapter's name."""
    if NAME.fullmatch(name) is None:
        problem = (
            f"{printable(name)!r} cannot be an adapter's name: it must be 1 to 64 letters, digits, dots, underscores "
            "and hyphens, and start with a letter or digit"
        )
        raise AdapterError("bad_name", problem, "name")


def parse_adapter_option(text: str) -> tuple[str, Path]:
    """`NAME=PATH` of the option --adapter. Raises AdapterError for anything else; the path may contain '='."""
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise AdapterError("bad_option", f"{printable(text)!r} is not of the form NAME=PATH", "adapter")
    check_name(name)
    return name, Path(path).expanduser()
