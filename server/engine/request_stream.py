"""One request's outputs on the event loop's side: text as it is made, stop strings, exactly one end.

Doesn't know the engine's thread: `async_engine` hands every step's output in. Used by the HTTP API.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from guanaco.models.error_codes import ErrorCode
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.detokenizer import Detokenizer
from guanaco.server.engine.request import FinishReason, Request, TokenLogprob, TokenOutput


class TextOutput(NamedTuple):  # made for every token: a dataclass takes several times as long
    """One step's result for one request, as text. The `num_…` counts are running totals."""

    text: str  # new text only: whole characters, and nothing that may become a stop string
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    error: ErrorCode | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    queue_seconds: float | None = None  # from the request's arrival to its first step; None: it had none yet


class RequestStream:
    """One request's outputs: an async iterator that ends after the output with a finish reason. A listener may get them
    instead.

    Closing it early aborts the request. Outputs that a slow reader has not taken are kept: never more than the request
    may generate.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, forget: Callable[[str, bool], None]) -> None:
        """forget: called with (request id, whether the engine must still end the request) when the stream ends."""
        self.request = request
        self._forget = forget
        self._detokenizer = Detokenizer(tokenizer, request.params, request.prompt_token_ids)
        self._outputs: deque[TextOutput] = deque()
        self._arrived = asyncio.Event()
        self._listener: Callable[[TextOutput], None] | None = None
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self.logits: bytes | None = None  # the first token's, float32 [vocab], if the request asked for them
        self._ended = False  # the last output has come
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

    def listen(self, listener: Callable[[TextOutput], None]) -> None:
        """Call `listener` with each output, on the event loop, instead of iterating. Called before the first output."""
        self._listener = listener

    async def aclose(self) -> None:
        """Drop the outputs that were not taken, and end the request, if it has not ended, before the next step."""
        self._closed = True
        self._outputs.clear()
        self._arrived.set()
        if not self._ended:
            self._ended = True
            self._forget(self.request.request_id, True)

    def deliver(self, output: TokenOutput) -> None:
        """Add one step's output. Called by the engine, on the event loop."""
        if self._ended:
            return
        reason, stop_reason = output.finish_reason, output.stop_reason
        self.logits = self.logits or output.logits
        self._num_output_tokens += len(output.token_ids)
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        shown = output.token_ids
        if reason is FinishReason.STOP and not (output.ends_in_text or self.request.params.include_stop_str):
            shown = shown[:-1]  # the eos or stop token itself is not part of the text
        text = self._detokenizer.append(shown, finished=reason is not None)
        aborted = False
        params = self.request.params
        if isinstance(stop_reason, int) and (name := dict(params.stop_token_texts).get(stop_reason)):
            is_hidden = params.skip_special_tokens or stop_reason in params.hidden_token_ids
            stop_reason = name
            if params.include_stop_str and is_hidden:
                text += name  # control tokens are not part of the text, but the client asked for this one
        elif self._detokenizer.stop_reason is not None:
            aborted = reason is None
            reason, stop_reason = FinishReason.STOP, self._detokenizer.stop_reason
        self._put(output, text, reason, stop_reason)
        if reason is not None:
            self._forget(self.request.request_id, aborted)

    def fail(self, error: ErrorCode) -> None:
        """End the stream with an error. Called by the engine, on the event loop."""
        if not self._ended:
            failure = TokenOutput(self.request.request_id, (), finish_reason=FinishReason.ERROR, error=error)
            self._put(failure, "", FinishReason.ERROR, None)

    def _put(self, output: TokenOutput, text: str, reason: FinishReason | None, stop_reason: int | str | None) -> None:
        self._ended = reason is not None
        made = TextOutput(
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
        if self._listener is not None:
            self._listener(made)
            return
        self._outputs.append(made)
        self._arrived.set()
