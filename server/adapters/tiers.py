"""Adapter versions between disk and host memory: reads what the engine's ledger wants, and drops what it gives up.

Decides nothing: the scheduler does, on the engine's thread; here are the threads that read, and the registry's copies.
A version that can't be read is marked broken. Made and used by the adapter manager.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import LoadedAdapter
from guanaco.adapters.residency.messages import AddVersion, ForgetVersion, ReadDone
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.adapters.versions.store import VersionStore
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

# Reads at the same time. Many, since they wait for a disk: one that hangs must not keep the others from theirs.
_READ_THREADS = 16


class AdapterTiers:
    """The `AdapterSource` of an engine: all versions of one store. `start`, `drop` and `gone` are for the engine's
    thread."""

    def __init__(
        self,
        registry: AdapterRegistry,
        store: VersionStore,
        engine: AsyncEngine,
        on_broken: Callable[[str], None],
        device_bytes: Callable[[LoadedAdapter], int] = lambda _: 0,
    ) -> None:
        """on_broken: a version turned out not to be readable; called on the event loop. device_bytes: what an adapter
        takes of the device's arena, 0 where there is none."""
        self._registry = registry
        self._store = store
        self._engine = engine
        self._on_broken = on_broken
        self._device_bytes = device_bytes
        self._leaving: dict[str, asyncio.Future[bool]] = {}  # versions that the engine was told to forget
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="guanaco-adapter-reads")
        engine.read_adapters_from(self)

    def start(self, version: str) -> None:
        """Have a version read into host memory."""
        self._threads.submit(self._read, version)

    def drop(self, version: str) -> None:
        """Let a copy in host memory go."""
        self._registry.let_go(version)

    def gone(self, version: str) -> None:
        """A version of `forget` is off device and host."""
        self._engine.on_loop(self._gone, version)

    def adopt(self, adapter: LoadedAdapter, *, is_permanent: bool = False) -> bool:
        """Before the engine starts: tell of a version that was just read. True if it is to stay in host memory, which
        one that no store has (`is_permanent`) must.

        Raises AdapterError for one that is too large ever to be there.
        """
        residency, version, num_bytes = self._engine.residency, adapter.version, adapter.num_bytes
        device_bytes = self._device_bytes(adapter)
        self._told(version)
        if residency.add(version, num_bytes, device_bytes, is_here=True, is_permanent=is_permanent):
            return residency.is_ready([version])
        if not residency.add(version, num_bytes, device_bytes):
            raise self._full(adapter)
        return False

    async def register(self, adapter: LoadedAdapter) -> None:
        """Tell of a version that requests may ask for from now on. AdapterError where there is no room for it beside
        what requests hold."""
        self._told(adapter.version)
        if not await self._engine.add_versions(
            AddVersion(adapter.version, adapter.num_bytes, self._device_bytes(adapter))
        ):
            raise self._full(adapter)

    async def forget(self, version: str) -> bool:
        """Have a version taken off device and host that no request will ask for; False where it came back before."""
        if not self._engine.health().live:
            return True
        left = self._leaving.setdefault(version, asyncio.get_running_loop().create_future())
        self._engine.send(ForgetVersion(version))
        return await asyncio.shield(left)

    def _told(self, version: str) -> None:
        """The engine hears of a version, perhaps again: it may read the stored copy."""
        if (left := self._leaving.pop(version, None)) is not None:
            left.set_result(False)
        holds = self._registry.holds
        if not holds.count(version, Holder.ENGINE):
            holds.take(version, Holder.ENGINE)

    def _gone(self, version: str) -> None:
        if (left := self._leaving.pop(version, None)) is not None:
            left.set_result(True)
            if self._registry.holds.count(version, Holder.ENGINE):
                self._registry.holds.give_back(version, Holder.ENGINE)

    def tier(self, version: str) -> str:
        """`device`, `host` or `disk`: the fastest place that has it, perhaps a step ago."""
        return self._engine.residency.tier(version)

    def check_room(self, adapter: LoadedAdapter) -> None:
        """AdapterError where an adapter would find no room now, beside what requests hold."""
        residency = self._engine.residency
        too_large = self._device_bytes(adapter) > residency.slots.num_bytes
        if too_large or (
            not residency.host.is_known(adapter.version) and adapter.num_bytes > residency.host.num_evictable_bytes
        ):
            raise self._full(adapter)

    @property
    def free_bytes(self) -> int:
        """Of host memory, what a new adapter could have."""
        return self._engine.residency.host.num_evictable_bytes

    def close(self) -> None:
        """Read no more. A read that hangs is left behind."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _full(self, adapter: LoadedAdapter) -> AdapterError:
        host, slots = self._engine.residency.host, self._engine.residency.slots
        if (device_bytes := self._device_bytes(adapter)) > slots.num_bytes:
            problem = f"it takes {device_bytes} bytes of the device's {slots.num_bytes}: raise --adapter-device-memory"
            return AdapterError(ErrorCode.DEVICE_MEMORY_FULL, problem)
        problem = (
            f"it needs {adapter.num_bytes} bytes, and {host.num_evictable_bytes} of {host.limit_bytes} are free or "
            "could be: unload another, wait for what runs, or raise --adapter-host-memory"
        )
        return AdapterError(ErrorCode.HOST_MEMORY_FULL, problem)

    def _read(self, version: str) -> None:
        """On a thread of its own: bring one version into memory, and tell the engine how that went."""
        error: ErrorCode | None = None
        try:
            self._registry.keep(self._registry.staged(version) or self._store.read(version))
        except AdapterError as problem:
            logger.error("adapter version %.12s could not be read: %s", version, problem)
            error = ErrorCode.ADAPTER_READ_FAILED
            if problem.code != ErrorCode.UNREADABLE:  # which says nothing about the copy: too many open files, say
                error = ErrorCode.ADAPTER_BROKEN
                self._registry.mark_broken(version, problem.code, str(problem))
                self._engine.on_loop(self._on_broken, version)
        except Exception:
            logger.exception("adapter version %.12s could not be read", version)
            error = ErrorCode.ADAPTER_READ_FAILED
        self._engine.send(ReadDone(version, error))
