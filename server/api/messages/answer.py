"""A message of Anthropic's API, whole or as its sequence of events.

message_start, then for each block content_block_start, its deltas and content_block_stop, then message_delta with the
stop reason and the usage, and message_stop. Doesn't know HTTP; `serving` and `sse` call it.
"""

from typing import Any

import orjson

from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.catalog import ServedModel
from guanaco.server.api.generation.encode import named_event
from guanaco.server.api.http.error_paths import anthropic_envelope
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.messages.protocol import MessagesBody
from guanaco.server.engine.request import FinishReason
from guanaco.server.engine.request_stream import TextOutput


class MessagesAnswer(Answer):
    """One message. `request_id`: of the HTTP request, for errors in the middle of a stream."""

    id_prefix = "msg_"

    def __init__(self, body: MessagesBody, model: ServedModel, request_id: str) -> None:
        super().__init__()
        self._model = model.name
        self._stop_sequences = frozenset(body.stop_sequences)
        self._max_tokens = body.max_tokens
        self._request_id = request_id
        self._texts: list[str] = []
        self._has_block = False
        self._last: TextOutput | None = None  # the one with a finish reason

    def first_events(self) -> bytes:
        return named_event({"type": "message_start", "message": self._message([], None, None)})

    def events(self, index: int, output: TextOutput) -> bytes:  # noqa: ARG002 (there is one choice)
        if output.finish_reason is not None:
            self._last = output
        if not output.text:
            return b""
        delta = {"type": "text_delta", "text": output.text}
        return self._begin_block() + named_event({"type": "content_block_delta", "index": 0, "delta": delta})

    def _begin_block(self) -> bytes:
        """The text's block, before its first text. A message without any text has one, too."""
        if self._has_block:
            return b""
        self._has_block = True
        block = {"type": "text", "text": ""}
        start = named_event({"type": "content_block_start", "index": 0, "content_block": block})
        return start + named_event({"type": "ping"})

    def last_events(self) -> bytes:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return (
            self._begin_block()
            + named_event({"type": "content_block_stop", "index": 0})
            + named_event({"type": "message_delta", "delta": delta, "usage": self._usage()})
            + named_event({"type": "message_stop"})
        )

    def failure(self, error: ApiError) -> bytes:
        envelope = anthropic_envelope(error.status, error.code, error.message, error.param, self._request_id)
        return named_event(envelope)

    def add(self, index: int, output: TextOutput) -> None:  # noqa: ARG002 (there is one choice)
        self._texts.append(output.text)
        if output.finish_reason is not None:
            self._last = output

    def encoded(self) -> bytes:
        return orjson.dumps(self._message([{"type": "text", "text": "".join(self._texts)}], *self._stop()))

    def _message(self, content: list[dict[str, Any]], reason: str | None, sequence: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _stop(self) -> tuple[str, str | None]:
        """The stop reason, and which of the client's sequences it was."""
        last = self._last
        assert last is not None, "a message ends with an output that has a finish reason"
        if last.finish_reason is FinishReason.LENGTH:
            in_full = last.num_output_tokens >= self._max_tokens
            return "max_tokens" if in_full else "model_context_window_exceeded", None
        # The chat template and the adapter's profile have stop strings, too: those end a turn.
        if isinstance(last.stop_reason, str) and last.stop_reason in self._stop_sequences:
            return "stop_sequence", last.stop_reason
        return "end_turn", None

    def _usage(self) -> dict[str, int]:
        """Anthropic counts tokens that came from the cache apart from the others of the prompt."""
        usage = self.generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
