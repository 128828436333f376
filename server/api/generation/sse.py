"""Answers as server-sent events: one JSON object per event, LF only, the last event once and only after success.

The route's `Answer` makes the events. A stream that can't be completed ends with an error event and without the route's
last event (`[DONE]`, say), so a stream without that event is always incomplete.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.choices import Generation, until_disconnect
from guanaco.server.api.generation.state import state_of
from guanaco.server.api.http.access_log import RequestRecord, record_of
from guanaco.server.api.http.errors import as_api_error, is_unforeseen
from guanaco.server.api.http.middleware import log_unforeseen
from guanaco.server.engine.request_stream import TextOutput

# Comment lines keep proxies from closing a quiet connection. nginx closes it after 60 s by default.
PING_SECONDS = 15.0
# The status line waits this long for the first output, so that a failure before it becomes a plain JSON error.
FIRST_OUTPUT_PATIENCE_SECONDS = 15.0
_LARGE_PIECE_BYTES = 1 << 20  # after a piece of this size, which takes milliseconds, other streams may run
_MAX_EVENTS_PER_WRITE = 256  # a slow reader's backlog is encoded in pieces of at most this many events

# The library would end all streams at SIGTERM. `GuanacoServer` lets them finish, within --drain-timeout.
AppStatus.enable_automatic_graceful_drain = False
# At DEBUG the library logs the text of every answer.
logging.getLogger("sse_starlette").setLevel(logging.INFO)


class EventStream(EventSourceResponse):
    """A streamed response. When it ends, its generation ends, even if the client left before the first event.

    Events are bytes, and all events of a step are one write, so the library neither encodes nor copies them.
    """

    def __init__(self, answer: Answer, events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events, sep="\n", ping=PING_SECONDS, ping_message_factory=_ping, headers={"Cache-Control": "no-store"}
        )
        del self.headers["Connection"]  # uvicorn sets it
        self._answer = answer

    def _send_with_timeout(self, send: Send, message: Message) -> Awaitable[None]:  # type: ignore[override]
        """Send without a time-out. The library's own method sets one up for each event, which takes as long as writing
        the event's JSON. A client that stops reading is noticed by `guard`."""
        return send(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.generation.aclose()
            self._answer.close()
            record = record_of(scope)
            if record.outcome is None:
                record.outcome = "cancelled"


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


async def stream_generation(request: Request, generation: Generation, answer: Answer) -> Response:
    """The streamed answer. A failure before the first output is raised, for a plain error response."""
    try:
        await until_disconnect(request.receive, generation.peek(FIRST_OUTPUT_PATIENCE_SECONDS))
    except BaseException:
        await generation.aclose()
        answer.close()
        raise
    pool, lane = state_of(request).answer_work, state_of(request).lane(request.scope.get("guanaco.key"))

    async def off_loop(index: int, output: TextOutput) -> bytes:
        return await pool.run(lane, answer.events, index, output)

    return EventStream(answer, _events(answer, record_of(request.scope), off_loop))


async def _events(
    answer: Answer, record: RequestRecord, off_loop: Callable[[int, TextOutput], Awaitable[bytes]]
) -> AsyncIterator[bytes]:
    step: list[bytes] = []  # the events that are written together
    try:
        if first := answer.first_events():
            step.append(first)
        if step and not answer.generation.has_more:
            yield step.pop()
        async for index, output in answer.generation:
            large = answer.is_large_output(index, output)
            if events := await off_loop(index, output) if large else answer.events(index, output):
                step.append(events)
            if step and (len(step) == _MAX_EVENTS_PER_WRITE or not answer.generation.has_more):
                yield b"".join(step)
                step.clear()
        num_bytes = 0
        for piece in answer.last_events():
            step.append(piece)
            num_bytes += len(piece)
            if num_bytes > _LARGE_PIECE_BYTES:
                yield b"".join(step)
                step.clear()
                num_bytes = 0
                await asyncio.sleep(0)  # let other streams run before the next piece is made
        record.outcome = "ok"
    except Exception as error:
        known = as_api_error(error)
        record.outcome, record.error_code = "failed", known.code
        if is_unforeseen(error):
            log_unforeseen(error, record.request_id)
        step.append(answer.failure(known))
    if step:
        yield b"".join(step)
