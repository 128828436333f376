"""The engine requests behind one HTTP request: n choices for each prompt, merged into one sequence of outputs.

It owns them: however the HTTP request ends, `aclose` ends those that the engine hasn't finished, and counts them.
Doesn't know the shape of any answer. Used by all generating routes.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from starlette.types import Receive

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.catalog import ServedModel
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.access_log import RequestRecord
from guanaco.server.api.http.errors import ClientGone, DeadlineExceeded, GenerationFailed, bad_request
from guanaco.server.api.http.lifecycle import Admission
from guanaco.server.engine.async_engine import NeverFits
from guanaco.server.engine.awake_clock import AwakeTimer, awake_seconds
from guanaco.server.engine.request import FinishReason, Request
from guanaco.server.engine.request_stream import RequestStream, TextOutput
from guanaco.server.metrics.server import RequestStats

T = TypeVar("T")

_ENDED_BADLY = (FinishReason.ERROR, FinishReason.ABORT)


@dataclass
class Choice:
    """The state of one engine request. Times are in seconds since the HTTP request's start."""

    request: Request
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    finish_reason: FinishReason | None = None


class Generation:
    """An async iterator of (choice index, output), in the order in which the engine gives them.

    Raises GenerationFailed, DeadlineExceeded, or the engine's own exceptions. Each of them ends the whole request.
    """

    def __init__(self, state: ApiState, model: ServedModel, record: RequestRecord, admission: Admission) -> None:
        self._state = state
        self._model = model
        self._record = record
        self._admission = admission
        self._streams: list[RequestStream] = []
        self._num_unfinished = 0
        self._mail: deque[tuple[int, TextOutput] | Exception] = deque()
        self._reader: asyncio.Future[None] | None = None  # done when there is mail again
        self._deadline: AwakeTimer | None = None
        self._closed = False
        self._cancelled = False
        self.choices: list[Choice] = []
        self.num_per_prompt = 1

    @classmethod
    async def start(
        cls,
        state: ApiState,
        model: ServedModel,
        record: RequestRecord,
        admission: Admission,
        requests: Sequence[Request],
        num_per_prompt: int,
    ) -> Self:
        """Submit all requests, or none. Raises a 400 if they can never run, or the engine's own exceptions.

        num_per_prompt: how many of the requests, in order, share one prompt.
        """
        self = cls(state, model, record, admission)
        self.num_per_prompt = num_per_prompt
        try:
            self._submit(requests)
        except BaseException:
            await self.aclose()
            raise
        limit = state.settings.request_timeout
        if limit:
            left = limit - (awake_seconds() - record.started)
            loop = asyncio.get_running_loop()
            self._deadline = AwakeTimer(loop, max(0.0, left), lambda: self._put(DeadlineExceeded()))
        return self

    def _submit(self, requests: Sequence[Request]) -> None:
        try:
            self._streams = self._state.engine.submit_all(requests)
        except NeverFits as error:
            raise bad_request(str(error), code=ErrorCode.TOO_MANY_PROMPTS) from None
        except ValueError as error:  # a request that can never run; the message holds numbers only
            raise bad_request(str(error), code=ErrorCode.CONTEXT_LENGTH_EXCEEDED) from None
        self.choices = [Choice(request, num_prompt_tokens=len(request.prompt_token_ids)) for request in requests]
        self._num_unfinished = len(requests)
        for index, stream in enumerate(self._streams):
            stream.listen(lambda output, index=index: self._put((index, output)))  # type: ignore[misc]

    def _put(self, item: tuple[int, TextOutput] | Exception) -> None:
        self._mail.append(item)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _woken(self) -> asyncio.Future[None]:
        """Done at the next `_wake`. There is one reader. An asyncio.Event would add two calls to each token."""
        self._reader = asyncio.get_running_loop().create_future()
        return self._reader

    async def peek(self, patience_seconds: float) -> None:
        """Wait up to `patience_seconds` for the first output, without taking it. Raises if it is a failure."""
        try:
            if not self._mail and not self._cancelled:
                await asyncio.wait_for(self._woken(), patience_seconds)
        except TimeoutError:
            return
        if not self._mail:
            return  # cancelled
        first = self._mail[0]
        if isinstance(first, Exception):
            raise first
        _raise_failure(first[1])

    @property
    def has_more(self) -> bool:
        """Whether the next item or the end is there already, so that `__anext__` would not wait."""
        return bool(self._mail) or self._num_unfinished == 0 or self._cancelled

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TextOutput]:
        if self._num_unfinished == 0:
            raise StopAsyncIteration
        while not self._mail:
            if self._cancelled:
                raise StopAsyncIteration
            await self._woken()
        item = self._mail.popleft()
        if isinstance(item, Exception):
            raise item
        index, output = item
        self._observe(index, output)
        _raise_failure(output)
        return item

    def _observe(self, index: int, output: TextOutput) -> None:
        choice = self.choices[index]
        metrics, adapter = self._state.metrics, self._model.counted_as
        now = awake_seconds() - self._record.started
        if (new_tokens := output.num_output_tokens - choice.num_output_tokens) > 0:
            if choice.first_token_seconds is None:
                choice.first_token_seconds = now
                metrics.observe_first_token(adapter, now)
                metrics.observe_prompt(adapter, choice.num_prompt_tokens, output.num_cached_tokens)
                if self._record.ttft_seconds is None:
                    self._record.ttft_seconds = now
            gap = None if choice.last_token_seconds is None else now - choice.last_token_seconds
            metrics.observe_tokens(adapter, new_tokens, gap)
            choice.last_token_seconds = now
        choice.num_output_tokens = output.num_output_tokens
        choice.num_cached_tokens = output.num_cached_tokens
        if output.queue_seconds is not None:
            choice.queue_seconds = output.queue_seconds
        if output.finish_reason is not None:
            if choice.request.params.max_tokens == 0 and output.finish_reason is FinishReason.LENGTH:
                metrics.observe_prompt(
                    adapter, choice.num_prompt_tokens, output.num_cached_tokens
                )  # without a first token, which counts the prompt of any other choice
            self._finish(index, output.finish_reason)

    def _finish(self, index: int, reason: FinishReason) -> None:
        choice = self.choices[index]
        choice.finish_reason = reason
        self._num_unfinished -= 1
        self._state.metrics.observe_request(
            RequestStats(
                adapter=self._model.counted_as,
                finish_reason=reason,
                num_prompt_tokens=choice.num_prompt_tokens,
                num_generation_tokens=choice.num_output_tokens,
                max_tokens=choice.request.params.max_tokens,
                n=self.num_per_prompt,
                e2e_seconds=awake_seconds() - self._record.started,
                queue_seconds=choice.queue_seconds,
                first_token_seconds=choice.first_token_seconds,
                last_token_seconds=choice.last_token_seconds,
                mixed_adapters=self._model.mixed_names,
            )
        )
        first = index - index % self.num_per_prompt
        siblings = self.choices[first : first + self.num_per_prompt]
        if all(sibling.finish_reason is not None for sibling in siblings):
            self._state.metrics.observe_longest(max(sibling.num_output_tokens for sibling in siblings))
        if self._num_unfinished == 0:
            self._admission.release()

    async def cancel(self) -> None:
        """End the generation without an error, from another request. Outputs so far stay; no more follow."""
        self._cancelled = True
        self._mail.clear()
        self._wake()
        for stream in self._streams:
            await stream.aclose()

    async def aclose(self) -> None:
        """End the engine requests that haven't finished, and write the counts into the request's record. May be called
        twice."""
        if self._closed:
            return
        self._closed = True
        if self._deadline is not None:
            self._deadline.cancel()
        for stream in self._streams:
            await stream.aclose()
        for index, choice in enumerate(self.choices):
            if choice.finish_reason is None:
                self._finish(index, FinishReason.ABORT)
        self._admission.release()
        usage = self.usage()
        self._record.prompt_tokens = usage["prompt_tokens"]
        self._record.completion_tokens = usage["completion_tokens"]
        self._record.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        self._record.num_choices = len(self.choices)
        self._record.finish_reasons = tuple(str(choice.finish_reason) for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage` object, with the tokens generated so far. May be called at any time, also after `aclose`.

        Completion tokens are those of all choices, shown or not. A prompt counts once, however many choices it has. Its
        cached tokens are the fewest that any of its choices found, because one choice also finds blocks that another
        has just cached; they are 0 until each choice has an output.
        """
        prompts = [self.choices[i : i + self.num_per_prompt] for i in range(0, len(self.choices), self.num_per_prompt)]
        prompt_tokens = sum(choices[0].num_prompt_tokens for choices in prompts)
        cached = sum(min(choice.num_cached_tokens for choice in choices) for choices in prompts)
        completion_tokens = sum(choice.num_output_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _raise_failure(output: TextOutput) -> None:
    if output.finish_reason in _ENDED_BADLY:
        raise GenerationFailed(output.error or ErrorCode.ABORTED)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless the client leaves first: then `work` is cancelled and ClientGone raised.

    Used while nothing is written to the client, since then a client that left would not be noticed.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
