"""The engine behind an event loop: requests go in, text comes out as it is made, and every request ends with a reason.

One thread steps the engine; messages to it wait for the next step, and each step's results come back with one call into
the loop. Detokenising and stop strings happen on the loop's side. Used by the HTTP API.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from guanaco.server.engine.detokenizer import Decoder, Detokenizer
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.request import FinishReason, Request, StepOutput, StepStats, TokenLogprob, TokenOutput

logger = logging.getLogger(__name__)

# TextOutput.error of requests that the engine itself ended
ENGINE_DEAD = "engine_dead"
SHUTTING_DOWN = "server_shutting_down"

_WATCH_SECONDS = 0.25  # how often a stuck engine is looked for
_LEAST_RETRY_SECONDS, _MOST_RETRY_SECONDS = 1.0, 60.0
_JOIN_SECONDS = 2.0  # an engine thread that is stuck in a step is left behind: it is a daemon


@dataclass(frozen=True)
class TextOutput:
    """What one step did for one request. The counts are running totals."""

    text: str  # new text only: whole characters, nothing that may become a stop string
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queue_seconds: float | None = None  # from the request's arrival to its first step; None: it has had none


@dataclass(frozen=True)
class QueueCaps:
    """What may wait at most before new requests are refused."""

    max_requests: int
    max_tokens: int


@dataclass(frozen=True)
class Health:
    live: bool  # the engine works, or is idle
    ready: bool  # … and takes new requests
    reason: str  # why not, for the operator; empty if all is well


class EngineOverloaded(Exception):
    """The queue is full."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class EngineUnavailable(Exception):
    """The engine takes no new requests: it is dead or stuck, or being drained."""

    def __init__(self, reason: str, *, draining: bool) -> None:
        super().__init__(reason)
        self.draining = draining


class RequestStream:
    """One request's outputs, an async iterator that ends after the one with a finish reason. Closing it early aborts.

    What a slow reader has not taken yet is kept here, and never more than the request may generate.
    """

    def __init__(self, engine: "AsyncEngine", request: Request) -> None:
        self.request = request
        self._engine = engine
        self._detokenizer = Detokenizer(engine.decoder, request.params, request.prompt_token_ids)
        self._outputs: deque[TextOutput] = deque()
        self._arrived = asyncio.Event()
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._ended = False  # the last output is there
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextOutput:
        while not self._outputs:
            if self._ended or self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._outputs.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the request if it has not ended, within a step. Outputs that were not taken are dropped."""
        self._closed = True
        self._outputs.clear()
        self._arrived.set()
        if not self._ended:
            self._ended = True
            self._engine.forget(self.request.request_id, abort=True)

    def deliver(self, output: TokenOutput) -> None:
        """Take in one step's output; called by the engine, on the loop."""
        if self._ended:
            return
        reason, stop_reason = output.finish_reason, output.stop_reason
        self._num_output_tokens += len(output.token_ids)
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        shown = output.token_ids
        if reason is FinishReason.STOP and not self.request.params.include_stop_str:
            shown = shown[:-1]  # the eos or stop token itself is no text
        text = self._detokenizer.append(shown, finished=reason is not None)
        aborted = False
        if self._detokenizer.stop_reason is not None:
            aborted = reason is None
            reason, stop_reason = FinishReason.STOP, self._detokenizer.stop_reason
        self._put(output, text, reason, stop_reason)
        if reason is not None:
            self._engine.forget(self.request.request_id, abort=aborted)

    def fail(self, error: str) -> None:
        """End with an error; called by the engine, on the loop."""
        if not self._ended:
            failure = TokenOutput(self.request.request_id, (), finish_reason=FinishReason.ERROR, error=error)
            self._put(failure, "", FinishReason.ERROR, None)

    def _put(self, output: TokenOutput, text: str, reason: FinishReason | None, stop_reason: int | str | None) -> None:
        self._ended = reason is not None
        self._outputs.append(
            TextOutput(
                text=text,
                token_ids=output.token_ids,
                logprobs=output.logprobs,
                prompt_logprobs=output.prompt_logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
                error=output.error,
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_cached_tokens=self._num_cached_tokens,
                num_output_tokens=self._num_output_tokens,
                queue_seconds=output.queue_seconds,
            )
        )
        self._arrived.set()


class AsyncEngine:
    """An `Engine` on a thread of its own. All public methods are for the event loop that `start` was called on."""

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        caps: QueueCaps,
        *,
        step_timeout_seconds: float,
        on_step: Callable[[StepStats], None] = lambda _: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.decoder = decoder
        self._engine = engine
        self._caps = caps
        self._step_timeout_seconds = step_timeout_seconds
        self._on_step = on_step
        self._on_death = on_death
        self._streams: dict[str, RequestStream] = {}
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._wake = threading.Condition()
        self._inbox: deque[Request | str] = deque()  # new requests, and ids to abort; guarded by _wake
        self._stopping = False  # guarded by _wake
        self._draining = False
        self._death: str | None = None
        self._busy_since: float | None = None  # written by the engine's thread: when the present step began
        self._tokens_per_second = 0.0
        self._watchdog: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="guanaco-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread and the watchdog, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watchdog = self._loop.create_task(self._watch())

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises EngineOverloaded, EngineUnavailable, or ValueError for one that can never fit."""
        if self._death is not None:
            raise EngineUnavailable(self._death, draining=False)
        if self._draining:
            raise EngineUnavailable("the server is shutting down", draining=True)
        assert request.request_id not in self._streams, "request ids are unique among those that are open"
        self._engine.scheduler.check_fits(request)
        self._check_caps(len(request.prompt_token_ids))
        stream = RequestStream(self, request)
        self._streams[request.request_id] = stream
        self._all_ended.clear()
        self._send(request)
        return stream

    def health(self) -> Health:
        if self._death is not None:
            return Health(live=False, ready=False, reason=self._death)
        if self._draining:
            return Health(live=True, ready=False, reason="draining")
        return Health(live=True, ready=True, reason="")

    @property
    def heartbeat_age_seconds(self) -> float:
        """For how long the present step has been running; 0 between steps."""
        busy_since = self._busy_since
        return 0.0 if busy_since is None else max(0.0, time.monotonic() - busy_since)

    async def drain(self, deadline_seconds: float) -> None:
        """Admit nothing more and let open requests finish; what is left at the deadline ends with an error."""
        self._draining = True
        try:
            await asyncio.wait_for(self._all_ended.wait(), deadline_seconds)
        except TimeoutError:
            self._end_all(SHUTTING_DOWN)

    async def stop(self) -> None:
        """End what is open, and the thread."""
        self._draining = True
        self._end_all(SHUTTING_DOWN)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._watchdog is not None:
            self._watchdog.cancel()
            await asyncio.gather(self._watchdog, return_exceptions=True)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def forget(self, request_id: str, *, abort: bool) -> None:
        """A stream has ended; with `abort`, the engine doesn't know yet. Called by the stream."""
        if self._streams.pop(request_id, None) is not None and abort:
            self._send(request_id)
        if not self._streams:
            self._all_ended.set()

    def _check_caps(self, num_prompt_tokens: int) -> None:
        """Refuse what would have to wait behind a full queue. The numbers may be a step old."""
        scheduler = self._engine.scheduler
        with self._wake:
            waiting = [item for item in self._inbox if isinstance(item, Request)]
        num_waiting = len(scheduler.waiting) + len(waiting)
        num_tokens = scheduler.num_waiting_tokens + sum(len(r.prompt_token_ids) for r in waiting)
        if num_waiting == 0:
            return  # whatever its length, it is next
        if num_waiting >= self._caps.max_requests or num_tokens + num_prompt_tokens > self._caps.max_tokens:
            seconds = num_tokens / self._tokens_per_second if self._tokens_per_second else _LEAST_RETRY_SECONDS
            raise EngineOverloaded(min(max(seconds, _LEAST_RETRY_SECONDS), _MOST_RETRY_SECONDS))

    def _send(self, message: Request | str) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()

    def _run(self) -> None:
        """The engine's thread: take in messages, step, hand the results to the loop; until told to stop, or dead."""
        try:
            while self._take_messages():
                self._busy_since = time.monotonic()
                output = self._engine.step()
                self._busy_since = None
                self._loop.call_soon_threadsafe(self._deliver, output)
        except RuntimeError:
            if not self._loop.is_closed():
                self._report_death()
        except BaseException:  # SystemExit too: a thread that ends silently would leave every client waiting
            self._report_death()

    def _take_messages(self) -> bool:
        """Wait for work; False when it is time to stop."""
        with self._wake:
            while not (self._stopping or self._inbox or self._engine.has_work):
                self._wake.wait()
            if self._stopping:
                return False
            messages, self._inbox = self._inbox, deque()
        for message in messages:
            if isinstance(message, Request):
                self._engine.add_request(message)
            else:
                self._engine.abort(message)
        return True

    def _report_death(self) -> None:
        logger.exception("the engine's thread ends")
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._die, "the engine failed")

    def _deliver(self, output: StepOutput) -> None:
        if output.stats.step_seconds > 0:
            rate = output.stats.num_scheduled_tokens / output.stats.step_seconds
            self._tokens_per_second += 0.1 * (rate - self._tokens_per_second)
        for item in output.outputs:
            stream = self._streams.get(item.request_id)
            if stream is None:
                continue  # it was closed in the meantime
            try:
                stream.deliver(item)
            except Exception:
                logger.exception("request %s: its tokens could not be turned into text", item.request_id)
                stream.fail("internal_error")
                self.forget(item.request_id, abort=True)
        self._on_step(output.stats)

    def _die(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            self._end_all(ENGINE_DEAD)
            self._on_death()

    def _end_all(self, error: str) -> None:
        for request_id, stream in list(self._streams.items()):
            stream.fail(error)
            self.forget(request_id, abort=True)

    async def _watch(self) -> None:
        """Notice a step that does not end."""
        while self._death is None:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.heartbeat_age_seconds > self._step_timeout_seconds:
                logger.error("a step has taken longer than %s s: the engine is stuck", self._step_timeout_seconds)
                self._die("the engine is stuck")
