"""The engine behind an event loop: requests go in, text comes out as it is made, and every request ends with a reason.

One thread steps the engine. Messages to it wait for the next step. Each step's results come back with one call into the
loop, made when the next step's forward pass begins: before that the engine holds Python's interpreter lock, and the
loop would only compete with it. Detokenising and stop strings happen on the loop's side. Used by the API and adapters.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.messages import AddVersion
from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import GuanacoError
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.awake_clock import CLOCK, awake_seconds
from guanaco.server.engine.engine import AdapterSource, Engine
from guanaco.server.engine.request import (
    Abort,
    LoraRef,
    Message,
    Request,
    SamplingParams,
    StepOutput,
    StepStats,
    Submit,
)
from guanaco.server.engine.request_stream import RequestStream

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25  # between two checks whether the engine is stuck
_LEAST_RETRY_SECONDS, _MOST_RETRY_SECONDS = 1.0, 60.0  # the range of EngineOverloaded.retry_after_seconds
_PROBE_SECONDS = 120.0  # limit of a probe request: its prompt is short, but in a busy engine it waits
_JOIN_SECONDS = 2.0  # an engine thread that is stuck in a step is left behind: it is a daemon


@dataclass(frozen=True)
class QueueCaps:
    """The most requests and prompt tokens that may wait; a request that would exceed one of them is refused."""

    max_requests: int
    max_tokens: int


@dataclass(frozen=True)
class Health:
    live: bool  # the engine works, or is idle
    ready: bool  # … and takes new requests
    reason: str  # why not, for the operator; empty if all is well


class EngineOverloaded(GuanacoError):
    """The queue is full."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class NeverFits(GuanacoError, ValueError):
    """Requests submitted together exceed what may ever wait at once. The message has the numbers."""


class ProbeFailed(GuanacoError):
    """A probe request of the engine ended without a result. `code` is the engine's error, None if there was none."""

    def __init__(self, code: ErrorCode | None, reason: str) -> None:
        super().__init__(code or reason)
        self.code = code


class EngineUnavailable(GuanacoError):
    """The engine takes no new requests: it is dead or stuck, or being drained."""

    def __init__(self, reason: str, *, draining: bool) -> None:
        super().__init__(reason)
        self.draining = draining


class AsyncEngine:
    """An `Engine` on a thread of its own. Methods are for the event loop of `start` unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        caps: QueueCaps,
        *,
        step_timeout_seconds: float,
        on_step: Callable[[StepStats], None] = lambda _: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._engine = engine
        engine.on_forward = self._post
        self._output: StepOutput | None = None  # the last step's, until the loop gets it; for the engine's thread only
        self._caps = caps
        self._step_timeout_seconds = step_timeout_seconds
        self._on_step = on_step
        self._on_death = on_death
        self._streams: dict[str, RequestStream] = {}
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._wake = threading.Condition()
        # Messages for the next step, each with the future that gets its answer, if any. Guarded by _wake.
        self._inbox: deque[tuple[Message, asyncio.Future[bool] | None]] = deque()
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
        CLOCK.start()
        self._thread.start()
        self._watchdog = self._loop.create_task(self._watch())

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises what `submit_all` raises."""
        return self.submit_all((request,))[0]

    def submit_all(self, requests: Sequence[Request]) -> list[RequestStream]:
        """Queue requests that belong together and name the same adapters: all of them, or none.

        Raises EngineOverloaded, EngineUnavailable, NeverFits, or ValueError for a request that can never run.
        """
        if self._death is not None:
            raise EngineUnavailable(self._death, draining=False)
        if self._draining:
            raise EngineUnavailable("the server is shutting down", draining=True)
        for request in requests:
            self._engine.scheduler.check_fits(request)
        self._check_caps(requests)
        return [self._open(request) for request in requests]

    def _open(self, request: Request) -> RequestStream:
        assert request.request_id not in self._streams, "request ids are unique among those that are open"
        stream = RequestStream(request, self._tokenizer, self.forget)
        self._streams[request.request_id] = stream
        self._all_ended.clear()
        self.send(Submit(request))
        return stream

    async def probe_adapter(self, version: str, token_ids: tuple[int, ...]) -> float:
        """The largest change of a logit that an adapter version makes after a prompt, against the base.

        Runs two background requests of one token each, so that no client's request waits for them. The runner must be
        able to load the version. Raises ProbeFailed, or EngineUnavailable.
        """
        if self._death is not None or self._draining:
            raise EngineUnavailable(self._death or "the server is shutting down", draining=self._draining)
        rows = await asyncio.gather(*(self._probe(token_ids, loras) for loras in ((), (LoraRef(version),))))
        return await asyncio.to_thread(_largest_difference, *rows)

    async def _probe(self, token_ids: tuple[int, ...], loras: tuple[LoraRef, ...]) -> bytes:
        request = Request(
            request_id=f"probe-{secrets.token_hex(8)}",
            prompt_token_ids=token_ids,
            params=SamplingParams(max_tokens=1, temperature=0.0, return_logits=True),
            loras=loras,
            cache_salt=secrets.token_hex(8),  # shares no KV blocks with any other request
            arrival_seconds=awake_seconds(),
            background=True,
        )
        code, reason = None, "the probe took too long"
        try:
            async with asyncio.timeout(_PROBE_SECONDS), self._open(request) as stream:
                async for output in stream:
                    code, reason = output.error, "the probe gave nothing"
                if stream.logits is not None:
                    return stream.logits
        except TimeoutError:
            pass
        raise ProbeFailed(code, reason)

    def end_adapter(self, version: str) -> int:
        """End every open request that uses an adapter version, with an error; returns how many there were. Probes go
        on, since another name with the same content may be loading."""
        open_streams = [stream for stream in self._streams.values() if not stream.request.background]
        users = [s for s in open_streams if any(lora.version == version for lora in s.request.loras)]
        for stream in users:
            stream.fail(ErrorCode.ADAPTER_UNLOADED)
            self.forget(stream.request.request_id, abort=True)
        return len(users)

    async def add_versions(self, *messages: AddVersion) -> bool:
        """Have the engine handle these messages between the same two steps. Returns whether all versions found room.

        True if the engine has stopped, False if it does not answer within the step timeout.
        """
        if not messages or self._death is not None or not self._thread.is_alive():
            return True
        answers = [self._loop.create_future() for _ in messages]
        self._put(*zip(messages, answers, strict=True))
        _, late = await asyncio.wait(answers, timeout=self._step_timeout_seconds)
        return not late and all(answer.result() for answer in answers)

    def send(self, message: Message) -> None:
        """Have the engine handle a message before its next step. Any thread may call it."""
        self._put((message, None))

    def on_loop(self, tell: Callable[[str], None], version: str) -> None:
        """Call `tell` with an adapter version on the event loop, unless that is closed. Any thread may call it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(tell, version)

    @property
    def residency(self) -> ResidencyLedger:
        """The ledger of adapters. Any thread may read it, perhaps a step late; it is changed before `start` only."""
        return self._engine.scheduler.residency

    def keep_from_start(self, *messages: AddVersion) -> tuple[bool, ...]:
        """Keep versions in host memory. Called before `start`. Returns for each whether there was room."""
        return self._engine.keep_from_start(*messages)

    def read_adapters_from(self, source: AdapterSource) -> None:
        """Set the source of adapters that are not in host memory. Called before `start`."""
        self._engine.source = source

    def health(self) -> Health:
        if self._death is not None:
            return Health(live=False, ready=False, reason=self._death)
        if self._draining:
            return Health(live=True, ready=False, reason="draining")
        return Health(live=True, ready=True, reason="")

    @property
    def heartbeat_age_seconds(self) -> float:
        """How long the present step has run, by the awake clock; 0 between steps."""
        busy_since = self._busy_since
        return 0.0 if busy_since is None else max(0.0, awake_seconds() - busy_since)

    async def drain(self, deadline_seconds: float) -> None:
        """Refuse new requests and let open ones finish. Those still open at the deadline end with an error."""
        self._draining = True
        try:
            await asyncio.wait_for(self._all_ended.wait(), deadline_seconds)
        except TimeoutError:
            self._end_all(ErrorCode.SERVER_SHUTTING_DOWN)

    async def stop(self) -> None:
        """End the open requests and the engine's thread."""
        self._draining = True
        self._end_all(ErrorCode.SERVER_SHUTTING_DOWN)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._watchdog is not None:
            self._watchdog.cancel()
            await asyncio.gather(self._watchdog, return_exceptions=True)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def forget(self, request_id: str, abort: bool) -> None:
        """Remove a stream that has ended. abort: the engine still runs its request, and must end it."""
        if self._streams.pop(request_id, None) is not None and abort:
            self.send(Abort(request_id))
        if not self._streams:
            self._all_ended.set()

    def _check_caps(self, requests: Sequence[Request]) -> None:
        """Raise EngineOverloaded or NeverFits for requests that the queue has no room for. All name the same adapters.
        The queue's numbers may be a step old.

        Requests whose adapters are not in host memory have a queue of their own, of the same size. One adapter may fill
        a quarter of it and three quarters of the main queue: neither a flood nor a slow disk shuts out other adapters.
        """
        scheduler, caps, versions = self._engine.scheduler, self._caps, requests[0].versions
        is_ready = scheduler.residency.is_ready(versions)
        quarter = max(1, caps.max_requests // 4)
        most_alike = max(1, caps.max_requests - quarter if is_ready else quarter) if versions else caps.max_requests
        new_tokens = sum(len(r.prompt_token_ids) for r in requests)
        # A single request may be of any length: in an empty queue it is next.
        if len(requests) > 1 and (len(requests) > most_alike or new_tokens > caps.max_tokens):
            raise NeverFits(
                f"{len(requests)} prompts and choices with {new_tokens} prompt tokens at once: this server lets "
                f"{most_alike} of them wait, with {caps.max_tokens} tokens; send fewer, or several requests"
            )
        with self._wake:
            coming = [message.request for message, _ in self._inbox if isinstance(message, Submit)]
        coming = [r for r in coming if scheduler.residency.is_ready(r.versions) is is_ready]
        waiting = scheduler.waiting[:] if is_ready else scheduler.loading.sequences[:]
        queue = [*(sequence.request for sequence in waiting), *coming]
        if not queue:
            return
        num_tokens = scheduler.num_waiting_tokens if is_ready else sum(s.num_tokens for s in waiting)
        num_tokens += sum(len(r.prompt_token_ids) for r in coming)
        num_alike = sum(r.versions == versions for r in queue) if versions else 0
        is_flood = num_alike + len(requests) > most_alike
        is_full = len(queue) + len(requests) > caps.max_requests or num_tokens + new_tokens > caps.max_tokens
        if is_full or is_flood:
            seconds = num_tokens / self._tokens_per_second if self._tokens_per_second else _LEAST_RETRY_SECONDS
            raise EngineOverloaded(min(max(seconds, _LEAST_RETRY_SECONDS), _MOST_RETRY_SECONDS))

    def _put(self, *messages: tuple[Message, asyncio.Future[bool] | None]) -> None:
        with self._wake:
            self._inbox.extend(messages)
            self._wake.notify()

    def _run(self) -> None:
        """The engine's thread: handle messages, step, hand the results to the loop, until it is stopped or fails."""
        try:
            while self._take_messages():
                self._busy_since = awake_seconds()
                output = self._engine.step()
                self._busy_since = None
                self._post()  # the previous output, if this step had no forward pass to hand it over
                self._output = output
                if not self._engine.has_work:
                    self._post()
        except RuntimeError:  # a closed loop raises it, too: then the process is ending
            if not self._loop.is_closed():
                self._report_death()
        except BaseException:  # SystemExit too: a thread that ends silently would leave every client waiting
            self._report_death()

    def _post(self) -> None:
        """Give the loop the last step's output."""
        output, self._output = self._output, None
        if output is not None:
            self._loop.call_soon_threadsafe(self._deliver, output)

    def _take_messages(self) -> bool:
        """Wait for work; False when it is time to stop."""
        with self._wake:
            while not (self._stopping or self._inbox or self._engine.has_work):
                self._wake.wait(self._engine.seconds_left)
            if self._stopping:
                return False
            messages, self._inbox = self._inbox, deque()
        answers = self._engine.handle(*(message for message, _ in messages))
        for (_, waiting), answer in zip(messages, answers, strict=True):
            if waiting is not None:
                self._loop.call_soon_threadsafe(_set_result, waiting, answer)
        return True

    def _report_death(self) -> None:
        logger.exception("the engine's thread ends")
        if not self._loop.is_closed():
            self._post()
            self._loop.call_soon_threadsafe(self._die, "the engine failed")

    def _deliver(self, output: StepOutput) -> None:
        if output.stats.step_seconds > 0:
            rate = output.stats.num_scheduled_tokens / output.stats.step_seconds
            self._tokens_per_second += 0.1 * (rate - self._tokens_per_second)
        for item in output.outputs:
            stream = self._streams.get(item.request_id)
            if stream is None:
                continue  # the stream was closed in the meantime
            try:
                stream.deliver(item)
            except Exception:
                logger.exception("request %s: its tokens could not be turned into text", item.request_id)
                stream.fail(ErrorCode.INTERNAL_ERROR)
                self.forget(item.request_id, abort=True)
        self._on_step(output.stats)

    def _die(self, reason: str) -> None:
        if self._death is None:
            self._death = reason
            self._end_all(ErrorCode.ENGINE_DEAD)
            self._on_death()

    def _end_all(self, error: ErrorCode) -> None:
        for request_id, stream in list(self._streams.items()):
            stream.fail(error)
            self.forget(request_id, abort=True)

    async def _watch(self) -> None:
        """Declare the engine dead when a step takes longer than the step timeout."""
        while self._death is None:
            await asyncio.sleep(_WATCH_SECONDS)
            if self.heartbeat_age_seconds > self._step_timeout_seconds:
                logger.error("a step has taken longer than %s s: the engine is stuck", self._step_timeout_seconds)
                self._die("the engine is stuck")


def _set_result(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():  # the caller may have given up
        future.set_result(value)


def _largest_difference(first: bytes, second: bytes) -> float:
    """The largest absolute difference between two float32 vectors, given as bytes. NaN if either holds a NaN."""
    a, b = array("f", first), array("f", second)
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")
