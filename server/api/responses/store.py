"""The responses that clients may ask for again: bounded in number, bytes and time, each for its own key alone.

Kept in memory: a restart forgets them. Doesn't know what a response says. Safe from any thread: the routes read it on
the event loop and on worker threads.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import orjson

from guanaco.server.config import Settings


@dataclass(frozen=True)
class StoredResponse:
    """One response that has ended. The items are JSON, and shared with the responses that go on from it."""

    id: str
    owner: str  # id of the API key; empty where the server has no keys
    content: bytes  # the response as JSON
    input_items: tuple[bytes, ...]  # of the whole conversation before the answer
    output_items: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        """What it takes of the store. Shared items count in each response: that is what it takes at most."""
        return len(self.content) + sum(map(len, self.input_items)) + sum(map(len, self.output_items))


class RunningResponse(Protocol):
    """A response that is being made."""

    id: str
    owner: str

    def snapshot(self) -> bytes:
        """The response as JSON, as far as it has come."""

    async def cancel(self) -> bytes:
        """End it, and give it as JSON."""


@dataclass(frozen=True)
class StoreLimits:
    """The settings `response_…`."""

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
    """What ended last stays longest: the oldest of a key goes first, and then the oldest of all."""

    def __init__(self, limits: StoreLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._ended: OrderedDict[str, tuple[float, StoredResponse]] = OrderedDict()  # id → (end of its time, it)
        self._by_owner: dict[str, OrderedDict[str, int]] = {}  # owner → id → bytes, oldest first
        self._running: dict[str, RunningResponse] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._ended)

    def begin(self, response: RunningResponse) -> None:
        """A response that is being made can be seen and cancelled."""
        with self._lock:
            self._running[response.id] = response

    def end(self, response_id: str, stored: StoredResponse | None) -> None:
        """It is made; None: nothing of it is kept. Nor is it if it was deleted meanwhile, or is larger than a key's
        share."""
        with self._lock:
            if self._running.pop(response_id, None) is not None and stored is not None:
                self._put(stored)

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """The response that has ended, for its owner."""
        with self._lock:
            self._forget_expired()
            _, stored = self._ended.get(response_id, (0.0, None))
            return stored if stored is not None and stored.owner == owner else None

    def items(self, owner: str) -> dict[str, bytes]:
        """The items of all responses of an owner that have ended, by their ids."""
        with self._lock:
            self._forget_expired()
            ended = [self._ended[response_id][1] for response_id in self._by_owner.get(owner, ())]
        found = {item: None for stored in ended for item in (*stored.input_items, *stored.output_items)}
        return {str(orjson.loads(item)["id"]): item for item in found}

    def running(self, response_id: str, owner: str) -> RunningResponse | None:
        """The response that is being made, for its owner."""
        with self._lock:
            running = self._running.get(response_id)
            return running if running is not None and running.owner == owner else None

    def delete(self, response_id: str, owner: str) -> bool:
        """Forget a response; one that is being made goes on, and is not kept. False where its owner has none."""
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
        """Free what is past its time. Called now and then, so that an idle server keeps nothing."""
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
