"""Answers as server-sent events: one JSON object an event, LF only, `[DONE]` once and only after success.

Doesn't know what the events say: an `Answer` of the route does. A stream that can't be completed ends with an error
event and without `[DONE]`, so that no `[DONE]` always means incomplete.
"""

from collections.abc import AsyncIterator

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guanaco.server.api.access_log import RequestRecord, quiet_talkative_loggers, record_of
from guanaco.server.api.answer import Answer
from guanaco.server.api.errors import as_api_error, is_unforeseen
from guanaco.server.api.generation import Generation, until_disconnect
from guanaco.server.api.middleware import log_unforeseen

DONE = b"data: [DONE]\n\n"

# Comment lines keep proxies from closing a connection on which nothing comes: nginx's default patience is 60 s.
PING_SECONDS = 15.0
# So long the status line waits for the first output, so that what fails before it is a plain JSON error.
FIRST_OUTPUT_PATIENCE_SECONDS = 15.0

quiet_talkative_loggers()  # sse-starlette logs every event it sends at debug level


def event(data: object) -> bytes:
    """One event, complete: sse-starlette would end one of its making with CRLF, which vLLM's clients can't split."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(EventSourceResponse):
    """The response, which owns the generation: it ends with it, even if the client left before the first event."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(
            events,
            sep="\n",
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
        )
        del self.headers["connection"]  # not the application's to promise: the server may want to close it
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.aclose()
            record = record_of(scope)
            if record.outcome is None:
                record.outcome = "cancelled"


async def stream_generation(request: Request, generation: Generation, answer: Answer) -> Response:
    """The streamed answer. What fails before the first output is raised, for a plain error response."""
    try:
        await until_disconnect(request.receive, generation.peek(FIRST_OUTPUT_PATIENCE_SECONDS))
    except BaseException:
        await generation.aclose()
        raise
    return EventStream(generation, _events(generation, answer, record_of(request.scope)))


async def _events(generation: Generation, answer: Answer, record: RequestRecord) -> AsyncIterator[bytes]:
    try:
        async for index, output in generation:
            if (chunk := answer.chunk(index, output)) is not None:
                yield event(chunk)
        if (last := answer.usage_chunk()) is not None:
            yield event(last)
        record.outcome = "ok"
        yield DONE
    except Exception as error:
        known = as_api_error(error)
        record.outcome, record.error_code = "failed", known.code
        if is_unforeseen(error):
            log_unforeseen(error, record.request_id)
        yield event(known.envelope())
