"""Moves adapter versions between disk and host memory, as the engine's ledger of residency decides.

The scheduler decides on the engine's thread. Here are the threads that read versions into the registry, and the calls
that drop them. A version whose stored copy is damaged or gone is marked broken. Made and used by the adapter manager.
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

# How many versions are read at the same time. They wait for a disk, and a read that hangs must not hold up the others.
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
        """on_broken: called on the event loop with a version whose stored copy is damaged or gone. device_bytes: how
        many bytes of the device's arena an adapter takes; 0 if the device has none."""
        self._registry = registry
        self._store = store
        self._engine = engine
        self._on_broken = on_broken
        self._device_bytes = device_bytes
        self._leaving: dict[str, asyncio.Future[bool]] = {}  # versions that the engine was told to forget
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="guanaco-adapter-reads")
        engine.read_adapters_from(self)

    def start(self, version: str) -> None:
        """Begin to read a version into host memory."""
        self._threads.submit(self._read, version)

    def drop(self, version: str) -> None:
        """Drop a version's copy in host memory."""
        self._registry.let_go(version)

    def gone(self, version: str) -> None:
        """End the `forget` of a version that is neither on the device nor in host memory any more."""
        self._engine.on_loop(self._gone, version)

    def adopt(self, adapter: LoadedAdapter, *, is_permanent: bool = False) -> bool:
        """Tell the engine, before it starts, of a version that was just read. Returns whether it stays in host memory.

        is_permanent: it must stay, since no store has it. Raises AdapterError if it is too large ever to fit.
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
        """Tell the engine of a version that requests may name from now on. Raises AdapterError if there is no room for
        it beside the versions that requests hold."""
        self._told(adapter.version)
        if not await self._engine.add_versions(
            AddVersion(adapter.version, adapter.num_bytes, self._device_bytes(adapter))
        ):
            raise self._full(adapter)

    async def forget(self, version: str) -> bool:
        """Take a version that no request will name off device and host memory. Returns False if it was registered again
        before that was done, and True if the engine is dead."""
        if not self._engine.health().live:
            return True
        left = self._leaving.setdefault(version, asyncio.get_running_loop().create_future())
        self._engine.send(ForgetVersion(version))
        return await asyncio.shield(left)

    def _told(self, version: str) -> None:
        """Hold a version for the engine, which may read its stored copy from now on. Ends a `forget` that still
        waits."""
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
        """`device`, `host` or `disk`: the fastest place that has a version. May be a step old."""
        return self._engine.residency.tier(version)

    def check_room(self, adapter: LoadedAdapter) -> None:
        """Raise AdapterError if an adapter would find no room now, beside the versions that requests hold."""
        residency = self._engine.residency
        too_large = self._device_bytes(adapter) > residency.slots.num_bytes
        if too_large or (
            not residency.host.is_known(adapter.version) and adapter.num_bytes > residency.host.num_evictable_bytes
        ):
            raise self._full(adapter)

    @property
    def free_bytes(self) -> int:
        """How many bytes of host memory a new adapter could get."""
        return self._engine.residency.host.num_evictable_bytes

    def close(self) -> None:
        """Start no more reads. A read that hangs is not waited for."""
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
        """Read one version into host memory, on a reading thread, and send the engine `ReadDone`."""
        error: ErrorCode | None = None
        try:
            self._registry.keep(self._registry.staged(version) or self._store.read(version))
        except AdapterError as problem:
            logger.error("adapter version %.12s could not be read: %s", version, problem)
            error = ErrorCode.ADAPTER_READ_FAILED
            if problem.code != ErrorCode.UNREADABLE:  # UNREADABLE may be no fault of the copy: too many open files, say
                error = ErrorCode.ADAPTER_BROKEN
                self._registry.mark_broken(version, problem.code, str(problem))
                self._engine.on_loop(self._on_broken, version)
        except Exception:
            logger.exception("adapter version %.12s could not be read", version)
            error = ErrorCode.ADAPTER_READ_FAILED
        self._engine.send(ReadDone(version, error))
