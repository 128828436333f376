"""A message of Anthropic's API, whole or as its sequence of events.

message_start, then for each block content_block_start, its deltas and content_block_stop, then message_delta with the
stop reason and the usage, and message_stop. Doesn't know HTTP; `serving` and `sse` call it.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from pydantic_core import from_json

from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.catalog import ServedModel
from guanaco.server.api.generation.encode import named_event
from guanaco.server.api.http.error_paths import anthropic_envelope
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.messages.protocol import MessagesBody
from guanaco.server.api.tools.reader import CallArguments, CallBegins, Content, Event, ToolCallReader, read_events
from guanaco.server.engine.request import FinishReason
from guanaco.server.engine.request_stream import TextOutput

Block = dict[str, Any]


class MessagesAnswer(Answer):
    """One message. reader: finds tool calls in the text; None: the text has none. request_id: the HTTP request's, for
    errors in the middle of a stream."""

    id_prefix = "msg_"

    def __init__(self, body: MessagesBody, model: ServedModel, reader: ToolCallReader | None, request_id: str) -> None:
        super().__init__()
        self._model = model.name
        self._stop_sequences = frozenset(body.stop_sequences)
        self._max_tokens = body.max_tokens
        self._request_id = request_id
        self._reader = reader
        self._blocks: list[Block] = []
        self._pieces: list[str] = []  # the last block's text, or the JSON of its call's input, in pieces
        self._is_open = False  # whether the last block is still unfinished
        self._last: TextOutput | None = None  # the output with a finish reason

    def first_events(self) -> bytes:
        return named_event({"type": "message_start", "message": self._message([], None, None)})

    def events(self, index: int, output: TextOutput) -> bytes:  # noqa: ARG002 (there is one choice)
        return b"".join(self._take(output))

    def last_events(self) -> Iterator[bytes]:
        events = [*self._open_text(), *self._close()] if not self._blocks else self._close()
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        end = named_event({"type": "message_delta", "delta": delta, "usage": self._usage()})
        yield b"".join(events) + end + named_event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        envelope = anthropic_envelope(error.status, error.code, error.message, error.param, self._request_id)
        return named_event(envelope)

    def add(self, index: int, output: TextOutput) -> None:  # noqa: ARG002 (there is one choice)
        self._take(output)

    def encoded(self) -> bytes:
        if not self._blocks:
            self._open_text()
        self._close()
        return orjson.dumps(self._message(self._blocks, *self._stop()))

    # Blocks. Each method returns the events of its change.

    def _take(self, output: TextOutput) -> list[bytes]:
        if output.finish_reason is not None:
            self._last = output
        return self._read(read_events(self._reader, output.text, is_last=output.finish_reason is not None))

    def _read(self, news: Sequence[Event]) -> list[bytes]:
        events: list[bytes] = []
        for new in news:
            match new:
                case Content(text):
                    events += self._open_text()
                    events.append(self._delta({"type": "text_delta", "text": text}, text))
                case CallBegins(_, name):
                    events += self._open({"type": "tool_use", "id": _call_id(), "name": name, "input": {}})
                case CallArguments(_, text):
                    events.append(self._delta({"type": "input_json_delta", "partial_json": text}, text))
        return events

    def _open_text(self) -> list[bytes]:
        """Begin a text block, unless the last block is one. An empty message has an empty text block."""
        if self._is_open and self._blocks[-1]["type"] == "text":
            return []
        return self._open({"type": "text", "text": ""})

    def _open(self, block: Block) -> list[bytes]:
        events = self._close()
        self._blocks.append(block)
        self._is_open = True
        place = len(self._blocks) - 1
        events.append(named_event({"type": "content_block_start", "index": place, "content_block": block}))
        if place == 0:
            events.append(named_event({"type": "ping"}))
        return events

    def _delta(self, delta: Block, piece: str) -> bytes:
        self._pieces.append(piece)
        return named_event({"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta})

    def _close(self) -> list[bytes]:
        """End the open block. A call that was cut off keeps the input that it has so far."""
        if not self._is_open:
            return []
        whole, block = "".join(self._pieces), self._blocks[-1]
        if block["type"] == "text":
            block["text"] = whole
        else:
            block["input"] = orjson.Fragment(_input(whole))
        self._pieces.clear()
        self._is_open = False
        return [named_event({"type": "content_block_stop", "index": len(self._blocks) - 1})]

    def _message(self, content: list[Block], reason: str | None, sequence: str | None) -> dict[str, Any]:
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
        """(stop reason, the client's stop sequence that matched or None)."""
        last = self._last
        assert last is not None, "a message ends with an output that has a finish reason"
        if last.finish_reason is FinishReason.LENGTH:
            in_full = last.num_output_tokens >= self._max_tokens
            return "max_tokens" if in_full else "model_context_window_exceeded", None
        # The chat template and the adapter's profile have stop strings, too. Those count as the end of the turn.
        if isinstance(last.stop_reason, str) and last.stop_reason in self._stop_sequences:
            return "stop_sequence", last.stop_reason
        return "tool_use" if self._reader is not None and self._reader.num_calls else "end_turn", None

    def _usage(self) -> dict[str, int]:
        """Anthropic's `usage`, which counts the prompt's cached tokens apart from its other tokens."""
        usage = self.generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }


# A surrogate pair as two escapes, half of a pair (group 1), or any other escape.
_ESCAPE = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.", re.DOTALL)


def _input(written: str) -> str:
    """A call's input as JSON: the text that the model wrote, closed if it was cut off.

    Integers of more than 64 bits, which orjson can't write, are kept. Half a surrogate pair, which clients can't read,
    becomes U+FFFD. A number beyond float64 makes the input empty.
    """
    text = _ESCAPE.sub(lambda match: r"\ufffd" if match[1] else match[0], written)
    try:
        return json.dumps(from_json(text, allow_partial=True) if text else {}, allow_nan=False)
    except ValueError:
        return "{}"


def _call_id() -> str:
    return "toolu_" + secrets.token_hex(12)
