"""OpenAI-compatible endpoints: requests with retries, a rate limit, counts of tokens, and a key for one origin only.

A key goes to the origin (scheme, host, port) that it was named for. Redirects are not followed, so no other origin ever
sees it. Messages show an endpoint's origin and never its key.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from guanaco.server.config import variable_of_user
from guanaco.server.errors import CommandError

TIMEOUT_SECONDS = 600.0
RETRIES = 5
_LONGEST_WAIT = 120.0  # seconds between two attempts, even if Retry-After asks for more
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_REFUSED = frozenset({400, 413, 422})  # statuses that refuse one request; others may still work
_MOST_BYTES = 64 << 20  # largest body of an answer
MAX_KEY_BYTES = 64 << 10
_SHORTEST_SECRET = 8  # characters: a shorter key may be a part of any text, so answers keep it

Sleep = Callable[[float], Awaitable[None]]


class RequestRefused(CommandError):
    """One request that the endpoint refuses or never answers; other requests may still work."""


@dataclass
class Usage:
    """Counts of one endpoint: our requests, and the tokens that it reports."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        """Add the tokens that an answer reports."""
        usage = answer.get("usage")
        if isinstance(usage, dict):
            for name in ("prompt_tokens", "completion_tokens"):
                count = usage.get(name)
                setattr(self, name, getattr(self, name) + (count if isinstance(count, int) else 0))


def origin_of(url: str, what: str) -> str:
    """Scheme, host and port of an http(s) address. what: begins the error message.

    Raises CommandError for another text, and for an address with a user, a password or a query.
    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    is_plain = url.isascii() and " " not in url.strip() and not (parts.username or parts.password or parts.query)
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise CommandError(f"{what}: expected an address such as http://127.0.0.1:8000 (keys go into --key)")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or (443 if parts.scheme == 'https' else 80)}"


def read_keys(options: Sequence[str]) -> dict[str, str]:
    """Origin → key, from `URL=env:VARIABLE` and `URL=file:PATH`. Raises CommandError; its message never holds a key."""
    keys = {}
    for option in options:
        url, separator, place = option.rpartition("=")
        kind, _, name = place.partition(":")
        if not separator or kind not in ("env", "file") or not name:
            raise CommandError("--key: write URL=env:VARIABLE or URL=file:PATH; a key itself never stands there")
        key = _key_from_file(Path(name)) if kind == "file" else variable_of_user(name)
        if not key or not key.strip():
            raise CommandError(f"--key {url}: {'the file' if kind == 'file' else 'the variable'} {name} holds no key")
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise CommandError(f"--key {url}: the key in {name} holds characters that no header can carry")
        keys[origin_of(url, "--key")] = key
    return keys


def _key_from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise CommandError(f"--key: {path} cannot be read ({error.strerror})") from None


@dataclass
class Endpoint:
    """One OpenAI-compatible server. Use it in `async with`.

    per_minute: most requests in a minute (None: no limit). parallel: most requests at a time.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    per_minute: float | None = None
    parallel: int = 8
    timeout: float = TIMEOUT_SECONDS
    retries: int = RETRIES
    sleep: Sleep = asyncio.sleep
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.origin = origin_of(self.url, self.url)
        self._root = self.url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
        self._slots = asyncio.Semaphore(self.parallel)
        self._next_start = 0.0
        self._was_reached = False
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        is_tls = self.origin.startswith("https:")  # without it no certificates need be read
        self._http = httpx2.AsyncClient(timeout=self.timeout, headers=headers, follow_redirects=False, verify=is_tls)

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def chat(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """(JSON object of the answer to a chat request, headers). Errors as `call`."""
        return await self.call("POST", "/v1/chat/completions", body)

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """(JSON object of the answer, headers). Tries again after errors that may pass.

        Raises RequestRefused if this request fails, and CommandError if no request would work.
        """
        async with self._slots:
            self.usage.requests += 1
            why = ""
            for attempt in range(self.retries + 1):
                if attempt:
                    self.usage.retries += 1
                await self._keep_pace()
                wait = min(_LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.75, 1.25)  # noqa: S311 (spreads retries)
                try:
                    response, content = await self._exchange(method, path, body)
                except (httpx2.ConnectError, httpx2.UnsupportedProtocol) as error:
                    if not self._was_reached:
                        hint = "start it (guanaco serve), or correct the address"
                        raise CommandError(f"no server at {self.origin} ({error}): {hint}") from None
                    if attempt == self.retries:  # the answers so far are in the work folder
                        hint = "start it again, and run the same command to go on"
                        raise CommandError(f"the server at {self.origin} is gone: {hint}") from None
                    why = type(error).__name__
                except (httpx2.TransportError, httpx2.DecodingError) as error:
                    why = type(error).__name__
                else:
                    self._was_reached = True
                    if response.status_code < 300 and (answer := self._object(content)) is not None:
                        self.usage.add(answer)
                        return answer, {name: self._without_key(value) for name, value in response.headers.items()}
                    why = self._problem(response, content)
                    wait = max(wait, _retry_after(response.headers.get("retry-after")))
                if attempt < self.retries:
                    await self.sleep(min(wait, _LONGEST_WAIT))
            self.usage.failures += 1
            raise RequestRefused(f"{self.origin}: no usable answer after {self.retries + 1} attempts ({why})")

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[httpx2.Response, bytes]:
        """A response and its body. Raises RequestRefused as soon as the body is larger than _MOST_BYTES."""
        async with self._http.stream(method, self._root + path, json=body) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _MOST_BYTES:
                    self.usage.failures += 1
                    raise RequestRefused(f"{self.origin} answered with more than {_MOST_BYTES >> 20} MiB")
        return response, bytes(content)

    def _problem(self, response: httpx2.Response, content: bytes) -> str:
        """Why a response is worth another attempt. Raises RequestRefused or CommandError if it is not."""
        status = response.status_code
        told = self._object(content) or {}
        error = told.get("error")
        words = str(error.get("message", "")) if isinstance(error, dict) else ""
        words = (words.replace(self.key, "(key)") if self.key else words)[:300]
        if status in _REFUSED:
            self.usage.failures += 1
            raise RequestRefused(f"{self.origin} refused a request ({status}): {words or 'no reason given'}")
        if status in _TRY_AGAIN or status < 300:
            return f"{status}" if status >= 300 else "an answer that is no JSON object"
        if status in (401, 403):
            raise CommandError(f"{self.origin} answered {status}: name its key with --key {self.origin}=env:VARIABLE")
        raise CommandError(f"{self.origin} answered {status}: {words or 'check the address'}")

    def _object(self, content: bytes) -> dict[str, Any] | None:
        """The JSON object of a body; None for anything else. A key that the endpoint repeats in it is taken out,
        because answers are kept and shown."""
        try:
            # JSON may hold half of a surrogate pair, which no report, page or request can carry: it becomes "?".
            text = json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8", "replace").decode()
            answer = json.loads(self._without_key(text, json.dumps(self.key)[1:-1] if self.key else None))
        except (ValueError, RecursionError):
            return None
        return answer if isinstance(answer, dict) else None

    def _without_key(self, text: str, written: str | None = None) -> str:
        """A text without this endpoint's key. written: the key as this text spells it, such as JSON's escapes."""
        if self.key is None or len(self.key) < _SHORTEST_SECRET:
            return text
        return text.replace(written or self.key, "(key)")

    async def _keep_pace(self) -> None:
        if self.per_minute:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 60 / self.per_minute
            if start > now:
                await self.sleep(start - now)


def _retry_after(text: str | None) -> float:
    """Seconds of a Retry-After header; 0 without a number. After a date the usual time is waited."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
