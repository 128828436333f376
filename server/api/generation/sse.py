"""Answers as server-sent events: one JSON object an event, LF only, `[DONE]` once and only after success.

Doesn't know what the events say: an `Answer` of the route does. A stream that can't be completed ends with an error
event and without `[DONE]`, so that no `[DONE]` always means incomplete.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.choices import Generation, until_disconnect
from guanaco.server.api.generation.encode import encode
from guanaco.server.api.generation.state import state_of
from guanaco.server.api.http.access_log import RequestRecord, record_of
from guanaco.server.api.http.errors import ClientGone, as_api_error, is_unforeseen
from guanaco.server.api.http.middleware import log_unforeseen
from guanaco.server.engine.request_stream import TextOutput

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"

# Comment lines keep proxies from closing a connection on which nothing comes: nginx's default patience is 60 s.
PING_SECONDS = 15.0
# So long the status line waits for the first output, so that what fails before it is a plain JSON error.
FIRST_OUTPUT_PATIENCE_SECONDS = 15.0
_FEW_LOGPROBS = 64  # tokens whose log-probabilities are written on the loop


def event(data: object) -> bytes:
    """One event, complete. LF: vLLM's clients can't split what ends with CRLF."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(StreamingResponse):
    """The response, which owns the generation: it ends with it, even if the client left before the first event.

    Writes on its own, not through sse-starlette: that takes 45 µs more for each event, a hundredth of a step of the
    demo (Zen 4, caches full of weights; docs/internal/log.md, 2026-11-26).
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        # nginx collects what it is not told to pass on at once
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pings = asyncio.create_task(_ping(send))
        try:
            await until_disconnect(receive, self.stream_response(send))
        except ClientGone:
            pass  # the status was sent; the record says the rest
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
            await self._generation.aclose()
            record = record_of(scope)
            if record.outcome is None:
                record.outcome = "cancelled"


async def _ping(send: Send) -> None:
    while True:
        await asyncio.sleep(PING_SECONDS)
        await send({"type": "http.response.body", "body": _PING, "more_body": True})


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
    try:
        async for index, output in generation:
            if len(output.prompt_logprobs) + len(output.logprobs) > _FEW_LOGPROBS:  # an echoed prompt's come at once
                if (large := await off_loop(index, output)) is not None:
                    yield large
            elif (chunk := answer.chunk(index, output)) is not None:
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
