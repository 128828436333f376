"""Where adapters come from: a source as the operator names it, read, copied, checked; or a version of the store.

Reads on threads of its own, never on the event loop. Names and changes nothing: the adapter manager calls it, and
publishes what it hands back.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, ParamSpec, TypeVar

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import LoadedAdapter, check_base
from guanaco.adapters.versions.profile import FROM_FILE, GIVEN, KEPT, Profile, parse_profile, read_profile
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.adapters.versions.store import OnStage, VersionStore
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.hub import AdapterHub, HubAddress

P = ParamSpec("P")
T = TypeVar("T")

_LOAD_THREADS = 2
_HUB_THREADS = 2
_FETCH_SECONDS = 1800.0
MAX_SOURCE_CHARS = 1024
ROLLED_BACK = "rolled back to "  # and a version: what is written down as the source then


@dataclass(frozen=True)
class AdapterPolicy:
    """What an operator allows while the server runs."""

    root: Path | None  # where sources lie; None: nothing can be loaded by path
    base_fingerprint: str
    strict_base: bool = False
    hub: AdapterHub | None = None  # where org/name@revision comes from; None: nothing does


@dataclass(frozen=True)
class LoadRequest:
    """A load as an operator asks for it. Two that are equal are the same load."""

    name: str
    source: str  # below the root, or of the hub
    replace: bool = False  # whether the name may be taken
    expected_version: str | None = None  # refuse unless the name stands for it now
    # How to serve it, as `parse_profile` takes it. None: as it was given before to this name, else as the file beside
    # the adapter says. An empty one takes what was given before away.
    profile: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Located:
    """Where the files of a source are."""

    path: Path
    root: Path | None  # that no link may lead out of; None: the hub's cache, where files are links
    source: str  # as it is written down: one of the hub with its commit


def shown_source(name: str, source: str) -> str:
    """An adapter's source as clients may see it.

    An address of the hub and a path below --adapter-root are shown as they are written down. Of any other path the last
    part is: clients must not learn where the operator keeps things. After a roll-back there is no source: the name.
    """
    if source.startswith(ROLLED_BACK):
        return name
    path = PurePath(source)
    is_telling = path.is_absolute() or ".." in path.parts or source.startswith("~")
    return (path.name if path.name not in ("", "..") else name) if is_telling else source


class AdapterSources:
    """Sources below the policy's root, and the versions of one store. Coroutines raise AdapterError."""

    def __init__(
        self, registry: AdapterRegistry, store: VersionStore, policy: AdapterPolicy, on_stage: OnStage
    ) -> None:
        self._registry = registry
        self._store = store
        self._policy = policy
        self._on_stage = on_stage
        self._threads = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="guanaco-adapters")
        # Their own: a hub that is slow must not keep others from the disk.
        self._hub_threads = ThreadPoolExecutor(_HUB_THREADS, thread_name_prefix="guanaco-hub")

    async def locate(self, source: str) -> Located:
        """The files of a source: below the root, or fetched from the hub. What is below the root goes first."""
        self._check_text(source)
        hub, root = self._policy.hub, self._policy.root
        address = HubAddress.parse(source) if hub is None else hub.address(source)
        if address is None or (root is not None and await self.on_thread(os.path.lexists, root / source)):
            if root is None:
                problem = "start the server with --adapter-root DIR: adapters are loaded from below it"
                raise AdapterError(ErrorCode.NO_ADAPTER_ROOT, problem, "source")
            # An absolute path replaces the root; that it leads below it is checked when it is opened.
            return Located(root / source, root, source)
        if hub is None:
            problem = "nothing below --adapter-root is called so, and --hub-adapters is off: nothing comes from the hub"
            raise AdapterError(ErrorCode.HUB_DISABLED, problem, "source")
        started = time.monotonic()
        try:
            fetching = asyncio.get_running_loop().run_in_executor(self._hub_threads, hub.fetch, address)
            path, pinned = await asyncio.wait_for(fetching, _FETCH_SECONDS)
        except TimeoutError:
            problem = f"{source} was not downloaded within {_FETCH_SECONDS:.0f} s; try again, whole files are kept"
            raise AdapterError(ErrorCode.HUB_FAILED, problem, "source") from None
        finally:
            self._on_stage("fetch", time.monotonic() - started)
        return Located(path, None, str(pinned))

    async def ingest(self, name: str, at: Located, *, keep: bool = True) -> LoadedAdapter:
        """The adapter of a source. What is kept is held as by a load; the caller gives that back."""
        return await self.on_thread(
            self._store.ingest, at.path, name=name, root=at.root, keep=keep, on_stage=self._on_stage
        )

    def checked(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """With a note where it records another base. AdapterError where that is to be refused."""
        try:
            check_base(adapter, self._policy.base_fingerprint)
        except AdapterError as error:
            if self._policy.strict_base:
                raise
            adapter = replace(adapter, notes=(*adapter.notes, str(error)))
        return adapter

    async def profile_beside(self, name: str, at: Located) -> Profile | None:
        """What the file beside an adapter asks for; None where there is none."""
        return await self.on_thread(read_profile, at.path, name, self._registry.templates, at.root)

    async def profile_for(self, name: str, at: Located, given: Mapping[str, Any] | None) -> tuple[Profile | None, str]:
        """How `name` is to be served after a load, and where that is from. given: by this load."""
        if given is not None:
            return self.profile(given), GIVEN if given else FROM_FILE
        beside = await self.profile_beside(name, at)  # read in any case: a bad one is refused
        broken = {entry.name: entry for entry in self._registry.broken()}
        entry = self._registry.resolve(name) or broken.get(name)
        if entry is None or entry.profile_from == FROM_FILE:
            return beside, FROM_FILE
        return entry.profile, KEPT

    def profile(self, fields: Mapping[str, Any]) -> Profile:
        """A profile as an operator gives it."""
        return parse_profile(fields, self._registry.templates)

    async def stored(self, version: str) -> LoadedAdapter:
        """A version that the store keeps."""
        return await self.on_thread(self._store.read, version)

    def stored_now(self, version: str) -> LoadedAdapter:
        """As `stored`, on the caller's thread: for the start, before anybody waits."""
        return self._store.read(version)

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
        """Give the threads and the store up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._hub_threads.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    def _check_text(self, source: str) -> None:
        if not source or len(source) > MAX_SOURCE_CHARS or not source.isprintable():
            problem = f"the path must have 1 to {MAX_SOURCE_CHARS} printable characters"
            raise AdapterError(ErrorCode.BAD_SOURCE, problem, "source")
