"""Reads and checks adapters: from a source that an operator names (a path, a hub address, a fine-tuning job), or from
the store.

Reads on threads of its own, never on the event loop. Changes no names: the adapter manager publishes the adapters that
it gets from here.
"""

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, ParamSpec, TypeVar

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import LoadedAdapter, check_base
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.profile import FROM_FILE, GIVEN, KEPT, Profile, parse_profile, read_profile
from guanaco.adapters.versions.registry import AdapterEntry, AdapterRegistry, BrokenEntry
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.adapters.versions.store import OnStage, VersionStore
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.hub import AdapterHub, HubAddress

P = ParamSpec("P")
T = TypeVar("T")

_LOAD_THREADS = 2
_HUB_THREADS = 2
_FETCH_SECONDS = 1800.0  # limit of one download
MAX_SOURCE_CHARS = 1024
_OF_A_JOB = re.compile(r"job:(ftjob-[0-9a-f]{24})")
ROLLED_BACK = "rolled back to "  # followed by a version: the recorded source after a roll-back


@dataclass(frozen=True)
class AdapterPolicy:
    """Where adapters may be loaded from while the server runs."""

    root: Path | None  # the directory below which sources lie; None: nothing can be loaded by path
    base_fingerprint: str
    strict_base: bool = False
    hub: AdapterHub | None = None  # the source of org/name@revision; None: the hub may not be used
    trained: Path | None = None  # where fine-tuning jobs leave their adapters, each in a folder of the job's id


@dataclass(frozen=True)
class LoadRequest:
    """A load as an operator asks for it. Equal requests at the same time are one load."""

    name: str
    source: str  # a path below the root, an address on the hub, or a fine-tuning job (`job_source`)
    replace: bool = False  # whether the name may be loaded already
    expected_version: str | None = None  # refuse the load unless the name stands for this version now
    # How to serve it, in the fields of `parse_profile`. None: keep the profile that a load gave to this name, else use
    # the file beside the adapter. Empty: drop the given profile and use the file.
    profile: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Located:
    """Where the files of a source are."""

    path: Path
    root: Path | None  # the directory that no link may lead out of; None: the hub's cache, where files are links
    source: str  # the source to record; an address on the hub has the commit as its revision


def job_source(job_id: str) -> str:
    """The source of the adapter that a fine-tuning job made."""
    return f"job:{job_id}"


def shown_source(name: str, source: str) -> str:
    """An adapter's source as clients may see it.

    An address on the hub and a path below --adapter-root are shown as they are recorded. Any other path is shown by its
    last part: clients must not learn where the operator keeps files. After a roll-back the name is shown.
    """
    if source.startswith(ROLLED_BACK):
        return name
    path = PurePath(source)
    is_telling = path.is_absolute() or ".." in path.parts or source.startswith("~")
    return (path.name if path.name not in ("", "..") else name) if is_telling else source


def kept_profile(entry: AdapterEntry | BrokenEntry | None) -> Profile | None:
    """The profile that an earlier load gave to a name, and that a further load keeps."""
    return None if entry is None or entry.profile_from == FROM_FILE else entry.profile


class AdapterSources:
    """Reads the sources that a policy allows, and the versions of one store. Coroutines raise AdapterError."""

    def __init__(
        self,
        registry: AdapterRegistry,
        store: VersionStore,
        policy: AdapterPolicy,
        on_stage: OnStage,
        shared: SharedRegistry | None = None,
    ) -> None:
        """shared: the shared directory from which versions are copied that the store lacks."""
        self._registry = registry
        self._store = store
        self._policy = policy
        self._on_stage = on_stage
        self._shared = shared
        self._threads = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="guanaco-adapters")
        # Threads of its own: a slow hub must not hold up loads from the disk.
        self._hub_threads = ThreadPoolExecutor(_HUB_THREADS, thread_name_prefix="guanaco-hub")

    async def locate(self, source: str) -> Located:
        """Find the files of a source: those of a fine-tuning job, or those below the root, or else those of the hub,
        which are downloaded."""
        self._check_text(source)
        trained = self._policy.trained
        if trained is not None and (match := _OF_A_JOB.fullmatch(source)) is not None:
            return Located(trained / match[1], trained, source)
        hub, root = self._policy.hub, self._policy.root
        address = HubAddress.parse(source) if hub is None else hub.address(source)
        if address is None or (root is not None and await self.on_thread(os.path.lexists, root / source)):
            if root is None:
                problem = "start the server with --adapter-root DIR: adapters are loaded from below it"
                raise AdapterError(ErrorCode.NO_ADAPTER_ROOT, problem, "source")
            # An absolute path replaces the root here. That it leads below the root is checked when it is opened.
            return Located(root / source, root, source)
        if hub is None:
            problem = "nothing below --adapter-root has this name, and --hub-adapters is off: the hub is not asked"
            raise AdapterError(ErrorCode.HUB_DISABLED, problem, "source")
        started = time.monotonic()
        try:
            fetching = asyncio.get_running_loop().run_in_executor(self._hub_threads, hub.fetch, address)
            path, pinned = await asyncio.wait_for(fetching, _FETCH_SECONDS)
        except TimeoutError:
            problem = f"{source} was not downloaded within {_FETCH_SECONDS:.0f} s; try again (complete files are kept)"
            raise AdapterError(ErrorCode.HUB_FAILED, problem, "source") from None
        finally:
            self._on_stage("fetch", time.monotonic() - started)
        return Located(path, None, str(pinned))

    async def ingest(self, name: str, at: Located, *, keep: bool = True) -> LoadedAdapter:
        """Read the adapter of a source and check it. keep: also copy it into the store, and hold the version
        (Holder.LOAD); the caller must give that hold back."""
        return await self.on_thread(
            self._store.ingest, at.path, name=name, root=at.root, keep=keep, on_stage=self._on_stage
        )

    def checked(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """The adapter, with a note if it records another base model. Raises AdapterError if the policy refuses that."""
        try:
            check_base(adapter, self._policy.base_fingerprint)
        except AdapterError as error:
            if self._policy.strict_base:
                raise
            adapter = replace(adapter, notes=(*adapter.notes, str(error)))
        return adapter

    async def profile_beside(self, name: str, at: Located) -> Profile | None:
        """The profile in the file beside an adapter; None if there is none."""
        return await self.on_thread(read_profile, at.path, name, self._registry.templates, at.root)

    async def profile_for(
        self,
        name: str,
        at: Located,
        given: Mapping[str, Any] | None,
        before: AdapterEntry | BrokenEntry | None,
    ) -> tuple[Profile | None, str]:
        """The profile of `name` after a load, and where it comes from (GIVEN, KEPT or FROM_FILE).

        given: the fields that this load gave. before: what the name stands for now.
        """
        if given is not None:
            return self.profile(given), GIVEN if given else FROM_FILE
        beside = await self.profile_beside(name, at)  # read in any case: a bad one is refused
        if before is None or before.profile_from == FROM_FILE:
            return beside, FROM_FILE
        return kept_profile(before), KEPT

    def profile(self, fields: Mapping[str, Any]) -> Profile:
        """The profile of the fields that an operator gave. Raises AdapterError."""
        return parse_profile(fields, self._registry.templates)

    async def stored(self, version: str) -> LoadedAdapter:
        """Read a version from the store, or else copy it there from the shared registry. The caller holds the version.
        Raises AdapterError."""
        return await self.on_thread(self.stored_now, version)

    def stored_now(self, version: str) -> LoadedAdapter:
        """As `stored`, on the caller's thread: for the start of the server."""
        try:
            return self._store.read(version)
        except AdapterError:
            if self._shared is None:
                raise
        if not self._shared.has_version(version):
            problem = f"neither this server nor the registry has version {version[:12]}; load the adapter again"
            raise AdapterError(ErrorCode.VERSION_MISSING, problem)
        adapter = self._store.ingest(self._shared.folder(version), name=version, version=version)
        self._registry.holds.give_back(version, Holder.LOAD)
        return adapter

    def folder(self, version: str) -> Path:
        """Where the store keeps the files of a version."""
        return self._store.directory / version

    def collect_now(self) -> None:
        """Remove the stored copies of versions that nobody holds."""
        self._store.collect()

    async def collect(self) -> None:
        """As `collect_now`, off the event loop."""
        await self.on_thread(self._store.collect)

    async def on_thread(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run file work on one of the loading threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *args, **options))

    def close(self) -> None:
        """Stop the threads and close the store."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._hub_threads.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    def _check_text(self, source: str) -> None:
        if not source or len(source) > MAX_SOURCE_CHARS or not source.isprintable():
            problem = f"the source must have 1 to {MAX_SOURCE_CHARS} printable characters"
            raise AdapterError(ErrorCode.BAD_SOURCE, problem, "source")
