"""Answers as server-sent events: one JSON object an event, LF only, `[DONE]` once and only after success.

Doesn't know what the events say: an `Answer` of the route does. A stream that can't be completed ends with an error
event and without `[DONE]`, so that no `[DONE]` always means incomplete.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.choices import Generation, until_disconnect
from guanaco.server.api.generation.encode import encode
from guanaco.server.api.generation.state import state_of
from guanaco.server.api.http.access_log import RequestRecord, record_of
from guanaco.server.api.http.errors import as_api_error, is_unforeseen
from guanaco.server.api.http.middleware import log_unforeseen
from guanaco.server.engine.request_stream import TextOutput

DONE = b"data: [DONE]\n\n"

# Comment lines keep proxies from closing a connection on which nothing comes: nginx's default patience is 60 s.
PING_SECONDS = 15.0
# So long the status line waits for the first output, so that what fails before it is a plain JSON error.
FIRST_OUTPUT_PATIENCE_SECONDS = 15.0
_FEW_LOGPROBS = 64  # tokens whose log-probabilities are written on the loop
_MAX_EVENTS_PER_WRITE = 256  # a slow reader's backlog is encoded in pieces of so many events

# The library would end all streams at SIGTERM. `GuanacoServer` lets them finish, within --drain-timeout.
AppStatus.disable_automatic_graceful_drain()
# At DEBUG the library logs the text of every answer.
logging.getLogger("sse_starlette").setLevel(logging.INFO)


def event(data: object) -> bytes:
    """One event, complete. LF: vLLM's clients can't split what ends with CRLF."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(EventSourceResponse):
    """The response, which owns the generation: it ends with it, even if the client left before the first event.

    The events come as bytes, all events of one step in one write, so the library neither encodes nor copies them.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events, sep="\n", ping=PING_SECONDS, ping_message_factory=_ping, headers={"Cache-Control": "no-store"}
        )
        del self.headers["Connection"]  # uvicorn says whether the connection stays
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.aclose()
            record = record_of(scope)
            if record.outcome is None:
                record.outcome = "cancelled"


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


async def stream_generation(request: Request, generation: Generation, answer: Answer) -> Response:
    """The streamed answer. What fails before the first output is raised, for a plain error response."""
    try:
        await until_disconnect(request.receive, generation.peek(FIRST_OUTPUT_PATIENCE_SECONDS))
    except BaseException:
        await generation.aclose()
        raise
    pool, lane = state_of(request).answer_work, state_of(request).lane(request.scope.get("guanaco.key"))

    async def off_loop(index: int, output: TextOutput) -> bytes | None:
        return await pool.run(lane, _large_event, answer, index, output)

    return EventStream(generation, _events(generation, answer, record_of(request.scope), off_loop))


def _large_event(answer: Answer, index: int, output: TextOutput) -> bytes | None:
    chunk = answer.chunk(index, output)
    return None if chunk is None else b"data: " + encode(chunk) + b"\n\n"


async def _events(
    generation: Generation,
    answer: Answer,
    record: RequestRecord,
    off_loop: Callable[[int, TextOutput], Awaitable[bytes | None]],
) -> AsyncIterator[bytes]:
    step: list[bytes] = []  # the events that are written together
    try:
        async for index, output in generation:
            if len(output.prompt_logprobs) + len(output.logprobs) > _FEW_LOGPROBS:  # an echoed prompt's come at once
                if (large := await off_loop(index, output)) is not None:
                    step.append(large)
            elif (chunk := answer.chunk(index, output)) is not None:
                step.append(event(chunk))
            if step and (len(step) == _MAX_EVENTS_PER_WRITE or not generation.has_more):
                yield b"".join(step)
                step.clear()
        if (last := answer.usage_chunk()) is not None:
            step.append(event(last))
        record.outcome = "ok"
        step.append(DONE)
    except Exception as error:
        known = as_api_error(error)
        record.outcome, record.error_code = "failed", known.code
        if is_unforeseen(error):
            log_unforeseen(error, record.request_id)
        step.append(event(known.envelope()))
    yield b"".join(step)
