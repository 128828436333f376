"""One list of adapters for several servers: applies other servers' changes, and writes this server's changes.

A change takes the directory's lock, reads the newest list and writes the changed list. Only then does this server serve
the change. So two servers never overwrite each other's changes. Lives on the event loop. Used by the manager.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO, ParamSpec, TypeVar

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.aliases import Alias
from guanaco.adapters.versions.registry import BrokenEntry, next_history
from guanaco.adapters.versions.registry_file import Saved, SavedList
from guanaco.adapters.versions.shared_registry import SharedRegistry
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.following import Behind, ListFollower

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

POLL_SECONDS = 0.5  # between two reads of the list; inotify does not report what other machines write
_RETRY_SECONDS = 5.0  # between two tries to serve a name that could not be served, if the list has not changed
_STALE_SECONDS = 10.0  # a list that was not read for so long counts as unreadable
_LOCK_SECONDS = 20.0  # how long a change waits for other servers' changes
_LOCK_POLL_SECONDS = 0.05


class Change:
    """One change of the list, while this server has the lock. Without a shared list its methods do nothing."""

    def __init__(self, shared: SharedRegistry | None, listed: SavedList, run: Callable[..., Awaitable[Any]]) -> None:
        self._shared = shared
        self._listed = listed
        self._run = run

    async def publish(self, wanted: Saved, *, again: bool) -> Saved | None:
        """Add or replace a name's record. Its version must have been copied by `Sharing.offer`. again: the version
        keeps its keys, as in `AdapterRegistry.publish`.

        Returns the record with its whole history; None without a shared list. Raises AdapterError.
        """
        if self._shared is None:
            return None
        if not await self._run(self._shared.has_version, wanted.version):
            problem = "the version's copy has left the registry meanwhile; load it again"
            raise AdapterError(ErrorCode.REGISTRY_FAILED, problem)
        before = self._listed.record(wanted.name)
        if before is not None:
            wanted = replace(wanted, history=next_history(before.version, before.history, wanted.version))
        keys = self._listed.version_keys
        if not again:
            at = (wanted.name, wanted.version)
            allowed = (wanted.profile or {}).get("allowed_keys")
            keys = tuple(known for known in keys if known[:2] != at)
            keys += () if allowed is None else ((*at, tuple(allowed)),)
        others = tuple(record for record in self._listed.records if record.name != wanted.name)
        await self._write(replace(self._listed, records=(*others, wanted), version_keys=keys))
        return wanted

    async def remove(self, name: str) -> bool:
        """Remove a name from the list. Returns whether the list had it. Raises AdapterError."""
        if self._shared is None or self._listed.record(name) is None:
            return False
        records = tuple(record for record in self._listed.records if record.name != name)
        await self._write(replace(self._listed, records=records))
        return True

    async def set_aliases(self, aliases: Iterable[Alias]) -> None:
        """Replace the aliases of the list. Raises AdapterError."""
        if self._shared is not None:
            await self._write(replace(self._listed, aliases=tuple(aliases)))

    async def _write(self, changed: SavedList) -> None:
        assert self._shared is not None
        kept = tuple(known for known in changed.version_keys if known[1] in changed.versions)
        self._listed = await self._run(self._shared.write, replace(changed, version_keys=kept))


class Sharing:
    """The list that this server follows, if it follows one."""

    def __init__(
        self,
        shared: SharedRegistry | None,
        follower: ListFollower,
        *,
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        """settle: called after names or aliases were changed."""
        self._shared = shared
        self._follower = follower
        self._settle = settle
        self._busy = asyncio.Lock()  # held while a list is applied or changed
        self._applied: SavedList | None = None
        self._behind: tuple[Behind, ...] = ()
        self._unreadable: str | None = None  # why the list could not be read
        self._tried_at = self._read_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guanaco-adapter-registry")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the list from now on. Does nothing without one."""
        if self._shared is not None:
            self._task = asyncio.get_running_loop().create_task(self._keep_following())

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def read_now(self) -> SavedList | None:
        """The list, on the caller's thread: for the start of the server. None without a list. Raises AdapterError."""
        return None if self._shared is None else self._shared.read()

    @property
    def state(self) -> str | None:
        """`current`, `behind` (some names could not be served as the list says) or `unreadable`; None without a
        list."""
        if self._shared is None:
            return None
        if self._unreadable is not None or time.monotonic() - self._read_at > _STALE_SECONDS:
            return "unreadable"
        return "behind" if self._behind else "current"

    def public(self) -> dict[str, Any] | None:
        """The state, the generation that is served and the problems, as plain data for JSON; None without a list."""
        if self._shared is None:
            return None
        return {
            "state": self.state,
            "generation": 0 if self._applied is None else self._applied.generation,
            "read_seconds_ago": round(time.monotonic() - self._read_at, 1),
            "problem": self._unreadable,
            "behind": [one.public() for one in self._behind],
        }

    def behind(self, name: str) -> BrokenEntry | None:
        """The list's entry of a name that this server could not serve as the list says; None for all other names."""
        return next((one.as_broken() for one in self._behind if one.record.name == name), None)

    async def sync(self) -> None:
        """Apply the newest list. An unreadable list and names that can't be served are logged and shown in `public`."""
        if self._shared is None:
            return
        async with self._busy:
            try:
                listed = await self._run(self._shared.read)
            except AdapterError as error:
                self._note_unreadable(str(error))
                return
            await self._apply(listed)

    async def offer(self, version: str, folder: Callable[[str], Any]) -> None:
        """Copy a version into the shared directory before a change names it. folder: version → the folder of its files.
        Raises AdapterError."""
        if self._shared is not None:
            await self._run(self._shared.add_version, version, folder(version))

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[Change]:
        """Run one change under the lock, after this server has applied the newest list. Raises AdapterError if the list
        can't be changed."""
        if self._shared is None:
            yield Change(None, SavedList(), self._run)
            return
        async with self._busy:
            lock = await self._lock(self._shared)
            try:
                listed = await self._run(self._shared.read_to_change)
                await self._apply(listed)
                yield Change(self._shared, listed, self._run)
            finally:
                lock.close()

    async def _lock(self, shared: SharedRegistry) -> BinaryIO:
        deadline = time.monotonic() + _LOCK_SECONDS
        while (lock := await self._run(shared.try_lock)) is None:
            if time.monotonic() > deadline:
                problem = "another server has been changing the adapter registry all the time; try again"
                raise AdapterError(ErrorCode.REGISTRY_BUSY, problem)
            await asyncio.sleep(_LOCK_POLL_SECONDS)
        return lock

    async def _apply(self, listed: SavedList) -> None:
        now = time.monotonic()
        self._read_at, self._unreadable = now, None
        if listed is self._applied and not (self._behind and now - self._tried_at > _RETRY_SECONDS):
            return
        self._tried_at = now
        behind = await self._follower.apply(listed)
        await self._settle()
        for one in behind:
            if one not in self._behind:
                logger.error(
                    "adapter %s: the registry's version %s cannot be served, and the former version stays: %s",
                    one.record.name,
                    one.record.version[:12],
                    one.problem,
                )
        self._applied, self._behind = listed, behind

    def _note_unreadable(self, problem: str) -> None:
        if problem != self._unreadable:
            logger.error("the adapter registry cannot be followed, and the adapters served until now stay: %s", problem)
        self._unreadable = problem

    async def _keep_following(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.sync()
            except Exception:
                logger.exception("the adapter registry could not be followed")
                self._unreadable = "the list could not be applied; the server's log says why"

    async def _run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **options))
