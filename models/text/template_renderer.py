"""Renders chat templates in processes that can be replaced, so that no template can stop the server or its shutdown.

Time and memory are limited (`TemplateLimits`). A process that exceeds them is killed, and another one is started. A
template is rendered in one process at a time, and all templates that were slow lately share one process. So a bad
template, however many chats use it, leaves a process to the others. Knows nothing of jinja2. Called by `chat_template`.
"""

import atexit
import codecs
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import TemplateError
from guanaco.models.formats.restricted_process import ProcessEnded, ProcessTimeout, RestrictedProcess

logger = logging.getLogger("guanaco.templates")

MAX_OUTPUT_CHARS = 1 << 24  # if the context sets no lower limit: 64 characters for each of 262,144 tokens
PIECE_CHARS = 1 << 16  # how much of a message to a process is encoded in one call
_WORKER = "guanaco.models.text.template_worker"
_HEAD_BYTES, _TEXT = 5, b"T"
_MAX_ERROR_BYTES = 1 << 16


@dataclass(frozen=True)
class TemplateLimits:
    """The limits of rendering."""

    seconds: float = 2.0  # for one rendering, and for the wait for a free process before it
    memory_bytes: int = 256 << 20  # of a process, with its interpreter
    num_processes: int = 2  # the most that run at the same time
    slow_seconds: float = 0.25  # a template that takes more processor time than this counts as slow …
    slow_for_seconds: float = 30.0  # … for this long
    start_seconds: float = 60.0  # for the start of a process; that is our own code, so only a busy machine is slow


class _Worker:
    """One process, and the digests of the templates that it has compiled."""

    def __init__(self, limits: TemplateLimits) -> None:
        arguments = (str(limits.memory_bytes), str(math.ceil(limits.seconds)))
        self.process = RestrictedProcess(_WORKER, arguments)
        self.digests: set[str] = set()
        self.process.receive(deadline=time.monotonic() + limits.start_seconds, max_bytes=_MAX_ERROR_BYTES)


class TemplateRenderer:
    """The rendering processes, which start when they are first needed. Safe to use from several threads."""

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._busy: dict[str, _Worker | None] = {}  # template's digest → its process; None while that starts
        self._slow_until: dict[str, float] = {}
        self._first: threading.Thread | None = None  # starts a process ahead of the first template

    def begin_start(self) -> None:
        """Start a process on another thread. The first template then waits only for the rest of its start."""
        self._first = threading.Thread(target=self._start_ahead, name="guanaco-template-process", daemon=True)
        self._first.start()

    def compile(self, digest: str, source: str) -> None:
        """Compile a template in a process. Raises TemplateError if it is wrong or exceeds the limits."""
        self._run(digest, source, None, 0)

    def render(self, digest: str, source: str, variables: Mapping[str, Any], max_chars: int) -> str:
        """The template's text, of at most `max_chars` characters. Raises TemplateError.

        digest: the SHA-256 of `source`, by which a process recognises it. variables: JSON's types only.
        """
        return self._run(digest, source, variables, min(max_chars, MAX_OUTPUT_CHARS))

    def close(self) -> None:
        """End all processes. Renderings that run end with an error; the next one starts new processes."""
        with self._changed:
            idle, self._idle = self._idle, []
            for busy in self._busy.values():
                if busy is not None:
                    busy.process.kill()
        for worker in idle:
            worker.process.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of all running processes."""
        with self._changed:
            workers = [*self._idle, *(worker for worker in self._busy.values() if worker is not None)]
        return tuple(worker.process.pid for worker in workers)

    def _run(self, digest: str, source: str, variables: Mapping[str, Any] | None, max_chars: int) -> str:
        request = {"digest": digest, "source": None, "variables": variables, "max_chars": max_chars}
        with self._turn(digest):
            worker = self._worker_for(digest)
            if digest not in worker.digests:
                request["source"] = source
            kind, content = self._exchange(worker, digest, request, max_chars)
            if kind != _TEXT and content["code"] == ErrorCode.UNKNOWN_TEMPLATE:  # the process dropped it for others
                kind, content = self._exchange(worker, digest, {**request, "source": source}, max_chars)
            if kind == _TEXT:
                worker.digests.add(digest)
                return str(content)
            if content["code"] == ErrorCode.TEMPLATE_TOO_LARGE:  # the process's memory may be fragmented
                worker.process.close()
            raise TemplateError(content["message"], content["code"])

    def _exchange(self, worker: _Worker, digest: str, request: Mapping[str, Any], max_chars: int) -> tuple[bytes, Any]:
        message = b"".join(json_pieces(request))
        most = _HEAD_BYTES + _MAX_ERROR_BYTES + 4 * max_chars  # UTF-8 takes four bytes for a character at most
        try:
            answer = worker.process.exchange(message, seconds=self.limits.seconds, max_bytes=most)
        except ProcessTimeout:
            self._remember_slow(digest)
            problem = f"it was stopped after {self.limits.seconds:g} s"
            logger.warning("chat template %s: %s", digest[:12], problem)
            raise TemplateError(problem, ErrorCode.TEMPLATE_TIMEOUT) from None
        except ProcessEnded as error:
            raise self._ended(digest, error) from None
        milliseconds, kind = int.from_bytes(answer[:4], "big"), answer[4:_HEAD_BYTES]
        if milliseconds > self.limits.slow_seconds * 1000:
            self._remember_slow(digest)
        content = memoryview(answer)[_HEAD_BYTES:]
        return kind, _text_of(content) if kind == _TEXT else json.loads(bytes(content))

    def _ended(self, digest: str, error: ProcessEnded) -> TemplateError:
        """The error for a process that ended while it rendered. If it was killed from outside, the template is not at
        fault."""
        problem = f"the process that rendered it ended ({error})"
        logger.warning("chat template %s: %s", digest[:12], problem)
        if error.was_killed:
            return TemplateError(problem, ErrorCode.TEMPLATE_UNAVAILABLE)
        self._remember_slow(digest)
        used_up = error.status == -signal.SIGXCPU
        return TemplateError(problem, ErrorCode.TEMPLATE_TIMEOUT if used_up else ErrorCode.TEMPLATE_CRASHED)

    def _start_ahead(self) -> None:
        with suppress(OSError, ProcessEnded, ProcessTimeout):  # the first template tries again, and says what is wrong
            worker = self._start()
            with self._changed:
                self._idle.append(worker)

    def _worker_for(self, digest: str) -> _Worker:
        if (first := self._first) is not None:
            first.join(self.limits.start_seconds)
            self._first = None
        with self._changed:
            while self._idle:
                worker = self._idle.pop()
                if not worker.process.has_ended:
                    self._busy[digest] = worker
                    return worker
                worker.process.close()
        try:
            worker = self._start()
        except (OSError, ProcessEnded, ProcessTimeout) as error:
            problem = (
                f"no process to render it could be started ({error or 'it took too long'}): check memory and processes"
            )
            logger.error("chat template: %s", problem)
            raise TemplateError(problem, ErrorCode.TEMPLATE_UNAVAILABLE) from None
        with self._changed:
            self._busy[digest] = worker
        return worker

    def _start(self) -> _Worker:
        """Start a process. If it ends while it starts, start one more."""
        try:
            return _Worker(self.limits)
        except ProcessEnded as error:
            logger.warning("a process for chat templates ended while it started (%s): starting another one", error)
            return _Worker(self.limits)

    @contextmanager
    def _turn(self, digest: str) -> Iterator[None]:
        """Take one of the places for renderings. Raises TemplateError (TEMPLATE_BUSY) if none becomes free in time."""
        with self._changed:
            self._wait_for_turn(digest)
            self._busy[digest] = None
        try:
            yield
        finally:
            with self._changed:
                worker = self._busy.pop(digest)
                if worker is not None and not worker.process.has_ended:
                    self._idle.append(worker)
                self._changed.notify_all()

    def _wait_for_turn(self, digest: str) -> None:
        deadline = time.monotonic() + self.limits.seconds
        while True:
            now = time.monotonic()
            is_free = digest not in self._busy and len(self._busy) < self.limits.num_processes
            if self._is_slow(digest, now):
                # Chats that waited for a slow template would occupy the threads that prepare all chats.
                if not is_free or any(self._is_slow(other, now) for other in self._busy):
                    raise TemplateError("a chat with it is being rendered, which takes long", ErrorCode.TEMPLATE_BUSY)
                return
            if is_free:
                return
            is_starting = None in self._busy.values()
            if now >= deadline and not is_starting:
                raise TemplateError("no process to render it became free", ErrorCode.TEMPLATE_BUSY)
            self._changed.wait(self.limits.seconds if is_starting else deadline - now)

    def _is_slow(self, digest: str, now: float) -> bool:
        return self._slow_until.get(digest, -math.inf) > now

    def _remember_slow(self, digest: str) -> None:
        with self._changed:
            now = time.monotonic()
            self._slow_until = {d: until for d, until in self._slow_until.items() if until > now}
            self._slow_until[digest] = now + self.limits.slow_for_seconds
            self._changed.notify_all()


def json_pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value in pieces. A long string is cut into several, since encoding one holds the interpreter's
    lock."""
    if isinstance(value, str) and len(value) > PIECE_CHARS:
        yield b'"'
        for start in range(0, len(value), PIECE_CHARS):
            piece = json.dumps(value[start : start + PIECE_CHARS], ensure_ascii=False)[1:-1]
            yield piece.encode("utf-8", "surrogatepass")
        yield b'"'
    elif isinstance(value, Mapping):
        separator = b"{"
        for key, item in value.items():
            yield separator + json.dumps(key).encode() + b":"
            yield from json_pieces(item)
            separator = b","
        yield b"{}" if separator == b"{" else b"}"
    elif isinstance(value, list | tuple):
        separator = b"["
        for item in value:
            yield separator
            yield from json_pieces(item)
            separator = b","
        yield b"[]" if separator == b"[" else b"]"
    else:
        yield json.dumps(value).encode()


def _text_of(data: memoryview) -> str:
    """UTF-8 as text, decoded piece by piece, since decoding holds the interpreter's lock."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    pieces = [decoder.decode(data[start : start + PIECE_CHARS]) for start in range(0, len(data), PIECE_CHARS)]
    return "".join([*pieces, decoder.decode(b"", final=True)])


@lru_cache(maxsize=1)
def shared_renderer() -> TemplateRenderer:
    """The renderer that all templates of this program share."""
    renderer = TemplateRenderer()
    atexit.register(renderer.close)
    return renderer
