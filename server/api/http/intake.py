"""Limits on token requests at the same time, on bytes of bodies in memory, and on grammars that wait.

Counts by API key, because the key is known before the body. Lives on the event loop and knows no routes. Used by every
route that reads a body.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.auth import ApiKey
from guanaco.server.api.http.errors import ApiError

# The size of an ordinary chat. The last eighth of the memory is kept for bodies up to it, so that large bodies can't
# shut them out.
_SMALL_BODY_BYTES = 64 << 10
_RETRY_SECONDS = 1.0


class Intake:
    """The counts of one server. has_keys: one key gets at most half of the token requests and of the bodies' memory.
    The limit of waiting grammars is for each key."""

    def __init__(
        self, *, max_token_requests: int, max_body_memory: int, has_keys: bool, max_queued_grammars: int = 64
    ) -> None:
        self.max_token_requests = max_token_requests
        self.max_queued_grammars = max_queued_grammars
        self.max_body_memory = max_body_memory
        self.num_body_bytes = 0
        self._has_keys = has_keys
        self._token_requests: Counter[str] = Counter()  # by key
        self._body_bytes: Counter[str] = Counter()  # by key
        self._grammars: Counter[str] = Counter()  # by key

    @property
    def num_token_requests(self) -> int:
        return self._token_requests.total()

    @contextmanager
    def token_request(self, key: ApiKey | None) -> Iterator[None]:
        """Hold a place for one request that only counts or converts tokens, from before its body is read until its
        answer is made. Raises a 429 if all places, or the key's half of them, are taken."""
        owner = _id_of(key)
        most = self.max_token_requests
        if self.num_token_requests >= most or self._token_requests[owner] >= self._share(most):
            text = "too many requests that only count or convert tokens at once; try again later"
            raise ApiError(429, ErrorCode.TOO_MANY_TOKEN_REQUESTS, text, retry_after=_RETRY_SECONDS)
        self._token_requests[owner] += 1
        try:
            yield
        finally:
            self._token_requests[owner] -= 1
            self._token_requests += Counter()  # drops entries with zero

    @contextmanager
    def grammar(self, key: ApiKey | None) -> Iterator[None]:
        """Hold a place for one schema or grammar until it is compiled. Raises a 429 if the key has too many: each may
        take seconds, and its request holds a place that other keys' requests need."""
        owner = _id_of(key)
        if self._grammars[owner] >= self.max_queued_grammars:
            text = (
                f"{self.max_queued_grammars} schemas or grammars of this API key wait to be compiled already "
                "(--max-queued-grammars); try again later, or use the same ones again: those are kept"
            )
            raise ApiError(429, ErrorCode.TOO_MANY_GRAMMARS, text, retry_after=_RETRY_SECONDS)
        self._grammars[owner] += 1
        try:
            yield
        finally:
            self._grammars[owner] -= 1
            self._grammars += Counter()  # without the zeros

    def body(self, key: ApiKey | None) -> "HeldBody":
        """The account of one body: `with intake.body(key) as held`, for as long as the body is in memory."""
        return HeldBody(self, _id_of(key))

    def _share(self, most: int) -> int:
        return max(1, most // 2) if self._has_keys else most

    def _check_room(self, owner: str, held: int, more: int) -> None:
        """Raise a 503 or 429 if a body that has `held` bytes in memory can't get `more`."""
        most = self.max_body_memory
        if held + more > _SMALL_BODY_BYTES:
            most -= most // 8
        if self.num_body_bytes + more > most:
            text = "the request bodies that are being read fill the memory for them; try again later"
            raise ApiError(503, ErrorCode.SERVER_OVERLOADED, text, retry_after=_RETRY_SECONDS)
        if self._body_bytes[owner] + more > self._share(self.max_body_memory):
            text = "the request bodies of this API key fill its half of the memory for them; try again later"
            raise ApiError(429, ErrorCode.TOO_MANY_BODY_BYTES, text, retry_after=_RETRY_SECONDS)

    def _change(self, owner: str, num_bytes: int) -> None:
        self.num_body_bytes += num_bytes
        self._body_bytes[owner] += num_bytes
        if not self._body_bytes[owner]:
            del self._body_bytes[owner]


class HeldBody:
    """Counts the bytes of one body in memory. Only received bytes count, not announced ones."""

    def __init__(self, intake: Intake, owner: str) -> None:
        self._intake = intake
        self._owner = owner
        self._num_bytes = 0

    def expect(self, num_bytes: int) -> None:
        """Raise a 503 or 429 if a body of `num_bytes` doesn't fit now. Called before any of it is read."""
        self._intake._check_room(self._owner, self._num_bytes, num_bytes)

    def add(self, num_bytes: int) -> None:
        """Count bytes that have arrived. Raises a 503 or 429 if they don't fit."""
        self._intake._check_room(self._owner, self._num_bytes, num_bytes)
        self._intake._change(self._owner, num_bytes)
        self._num_bytes += num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._intake._change(self._owner, -self._num_bytes)
        self._num_bytes = 0


def _id_of(key: ApiKey | None) -> str:
    return "" if key is None else key.id
