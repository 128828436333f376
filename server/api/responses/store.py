"""The responses that clients may ask for again: bounded in number, bytes and time, each for its own key alone.

Kept in memory, so a restart forgets them. Doesn't look into responses. Any thread may use it: the routes read it on the
event loop and on worker threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from guanaco.server.config import Settings


class StoredItem(NamedTuple):
    """One item of a conversation, with its id apart: nobody has to parse it to find it."""

    id: str
    json: bytes


@dataclass(frozen=True)
class StoredResponse:
    """One response that has ended. Responses that continue from it share its items."""

    id: str
    owner: str  # id of the API key; empty where the server has no keys
    content: bytes  # the response as JSON
    input_items: tuple[StoredItem, ...]  # the whole conversation before the answer
    output_items: tuple[StoredItem, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes in the store. Items that several responses share count in each, so this is the most that it
        takes."""
        return len(self.content) + sum(len(item.json) for item in (*self.input_items, *self.output_items))


class RunningResponse(Protocol):
    """A response that is being made."""

    id: str
    owner: str

    def snapshot(self) -> Mapping[str, Any]:
        """The response so far. It may be large: `answer.encode_response` writes it, on any thread."""

    async def cancel(self) -> None:
        """End it, unless it has ended."""

    def last_state(self) -> bytes:
        """The response that has ended, as JSON. The store keeps it from now on. Any thread may call this."""


@dataclass(frozen=True)
class StoreLimits:
    """How many seconds a response is kept, and how many responses and bytes: of all keys together, and of one key."""

    seconds: float
    count: int
    count_per_key: int
    num_bytes: int
    num_bytes_per_key: int

    @classmethod
    def from_settings(cls, settings: Settings) -> "StoreLimits":
        return cls(
            settings.response_ttl,
            settings.max_responses,
            settings.max_responses_per_key,
            settings.max_response_memory,
            settings.max_response_memory_per_key,
        )


class ResponseStore:
    """Keeps the responses that ended last. A key above its limit loses its oldest one; above the common limit, the
    oldest of all goes."""

    def __init__(self, limits: StoreLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._ended: OrderedDict[str, tuple[float, StoredResponse]] = OrderedDict()  # id → (expiry, response)
        self._by_owner: dict[str, OrderedDict[str, int]] = {}  # owner → id → bytes, oldest first
        self._running: dict[str, RunningResponse] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ended)

    def begin(self, response: RunningResponse) -> None:
        """Add a response that is being made, so that it can be read and cancelled."""
        with self._lock:
            self._running[response.id] = response

    def end(self, response_id: str, stored: StoredResponse | None) -> None:
        """Enter that a response has ended, and keep it as `stored`. It is not kept if that is None, if it was deleted
        meanwhile, or if it is larger than a key's share."""
        with self._lock:
            if self._running.pop(response_id, None) is not None and stored is not None:
                self._put(stored)

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """A response that has ended; None if its owner has none with this id."""
        with self._lock:
            self._forget_expired()
            _, stored = self._ended.get(response_id, (0.0, None))
            return stored if stored is not None and stored.owner == owner else None

    def items(self, owner: str) -> dict[str, bytes]:
        """The items of all ended responses of an owner: item id → the item's JSON."""
        with self._lock:
            self._forget_expired()
            ended = [self._ended[response_id][1] for response_id in self._by_owner.get(owner, ())]
        return {item.id: item.json for stored in ended for item in (*stored.input_items, *stored.output_items)}

    def running(self, response_id: str, owner: str) -> RunningResponse | None:
        """A response that is being made; None if its owner has none with this id."""
        with self._lock:
            running = self._running.get(response_id)
            return running if running is not None and running.owner == owner else None

    def delete(self, response_id: str, owner: str) -> bool:
        """Forget a response. One that is being made goes on, but is not kept. Returns False if its owner has none with
        this id."""
        with self._lock:
            self._forget_expired()
            running = self._running.get(response_id)
            if running is not None and running.owner == owner:
                del self._running[response_id]
                return True
            _, stored = self._ended.get(response_id, (0.0, None))
            if stored is None or stored.owner != owner:
                return False
            self._remove(response_id)
            return True

    def forget_expired(self) -> None:
        """Forget expired responses. Called regularly, so that an idle server keeps none."""
        with self._lock:
            self._forget_expired()

    def _put(self, stored: StoredResponse) -> None:
        limits, size = self.limits, stored.num_bytes
        if size > min(limits.num_bytes, limits.num_bytes_per_key) or limits.seconds <= 0:
            return
        self._forget_expired()
        mine = self._by_owner.get(stored.owner, OrderedDict())
        while mine and (len(mine) >= limits.count_per_key or sum(mine.values()) + size > limits.num_bytes_per_key):
            self._remove(next(iter(mine)))
        while self._ended and (len(self._ended) >= limits.count or self.num_bytes + size > limits.num_bytes):
            self._remove(next(iter(self._ended)))
        self._ended[stored.id] = (self._clock() + limits.seconds, stored)
        self._by_owner.setdefault(stored.owner, OrderedDict())[stored.id] = size
        self.num_bytes += size

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._ended and next(iter(self._ended.values()))[0] <= now:
            self._remove(next(iter(self._ended)))

    def _remove(self, response_id: str) -> None:
        _, stored = self._ended.pop(response_id)
        mine = self._by_owner[stored.owner]
        self.num_bytes -= mine.pop(response_id)
        if not mine:
            del self._by_owner[stored.owner]
