"""A response of OpenAI's Responses API, whole or as its sequence of numbered events.

Doesn't know HTTP; `serving` and `sse` call it. While a response is made, the store can show and cancel it. At the end
the store gets its last state: the client can read it again, or continue from it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.generation.answer import Answer
from guanaco.server.api.generation.choices import Generation
from guanaco.server.api.generation.encode import encode, named_event, named_event_pieces, pieces
from guanaco.server.api.generation.logprobs import chat_logprobs
from guanaco.server.api.http.errors import ApiError
from guanaco.server.api.responses.items import Item, new_id
from guanaco.server.api.responses.store import ResponseStore, StoredItem, StoredResponse
from guanaco.server.api.tools.calls import new_call_id
from guanaco.server.api.tools.reader import CallArguments, CallBegins, Content, ToolCallReader, read_events
from guanaco.server.engine.request import FinishReason, TokenLogprob
from guanaco.server.engine.request_stream import TextOutput

Event = dict[str, Any]
# How deep the log-probabilities are: event, response, output, item, content, part, log-probabilities.
_DEPTH = 7


class ResponsesAnswer(Answer):
    """One response. head: the fields that are known before the output. input_items: those of the whole conversation.
    owner: the id of the API key, empty without keys."""

    id_prefix = "resp_"

    def __init__(
        self,
        head: Mapping[str, Any],
        input_items: tuple[StoredItem, ...],
        owner: str,
        store: ResponseStore | None,
        tokenizer: Tokenizer | None,
        reader: ToolCallReader | None,
    ) -> None:
        """store: None if the response is not kept. tokenizer: None if log-probabilities aren't shown. reader: finds
        tool calls in the text; None: the text has none."""
        super().__init__()
        self.owner = owner
        self._head = {**head, "created_at": int(time.time())}
        self._input_items = input_items
        self._store = store
        self._tokenizer = tokenizer
        self._reader = reader
        self._output: list[Item] = []
        self._open_item: Item | None = None  # the last item, while it is unfinished
        self._pieces: list[str] = []  # the open item's text, or the JSON of its call's arguments, in pieces
        self._logprobs: list[TokenLogprob] = []  # log-probabilities that no event has shown yet
        self._status = "in_progress"
        self._incomplete: str | None = None
        self._error: dict[str, str] | None = None
        self._sequence_number = 0
        self._is_streamed = False
        self._is_kept = False  # its last state was offered to the store, which need not keep it
        self._events_of_cancel: list[Event] = []

    def start(self, generation: Generation) -> None:
        super().start(generation)
        if self._store is not None:
            self._store.begin(self)

    # The stream

    def first_events(self) -> bytes:
        self._is_streamed = True
        created = {"type": "response.created", "response": self._object()}
        return self._encoded([created, {**created, "type": "response.in_progress"}])

    def events(self, index: int, output: TextOutput) -> bytes:  # noqa: ARG002 (there is one choice)
        return self._encoded(self._take(output))

    def last_events(self) -> Iterator[bytes]:
        events = self._end() if self._status == "in_progress" else self._events_of_cancel
        for event in events:
            yield from named_event_pieces(self._numbered(event), _DEPTH)
        kind = "response.completed" if self._status == "completed" else "response.incomplete"
        last = self._numbered({"type": kind, "response": None})
        before, after = named_event(last).split(b"null", 1)
        yield before
        written = []
        for piece in pieces(self._object(), _DEPTH):
            written.append(piece)
            yield piece
        self._keep(b"".join(written))  # before the client knows that it has ended
        yield after

    def failure(self, error: ApiError) -> bytes:
        self._close_item("incomplete")
        self._status = "failed"
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._error = {"code": code, "message": error.message}
        return self._encoded([{"type": "response.failed", "response": orjson.Fragment(self.last_state())}])

    def _encoded(self, events: Sequence[Event]) -> bytes:
        return b"".join(named_event(self._numbered(event)) for event in events)

    def _numbered(self, event: Event) -> Event:
        self._sequence_number += 1
        return {**event, "sequence_number": self._sequence_number - 1}

    # The whole answer

    def add(self, index: int, output: TextOutput) -> None:  # noqa: ARG002 (there is one choice)
        self._take(output)

    def end(self) -> None:
        if self._status == "in_progress":
            self._end()

    def encoded(self) -> bytes:
        return self.last_state()

    @property
    def is_large(self) -> bool:
        return self._tokenizer is not None

    # The model's output. Each method returns the events of its change.

    def _take(self, output: TextOutput) -> list[Event]:
        """Add an output. Returns its events."""
        if self._tokenizer is not None:
            self._logprobs += output.logprobs
        if output.finish_reason is FinishReason.LENGTH:
            self._incomplete = "max_output_tokens"
        events: list[Event] = []
        for new in read_events(self._reader, output.text, is_last=output.finish_reason is not None):
            match new:
                case Content(text):
                    events += self._take_text(text)
                case CallBegins(_, name):
                    events += self._open_call(name)
                case CallArguments(_, text):
                    self._pieces.append(text)
                    place = self._place(in_part=False)
                    events.append({"type": "response.function_call_arguments.delta", **place, "delta": text})
        return events

    def _take_text(self, text: str) -> list[Event]:
        events = self._open_message()
        assert self._open_item is not None
        self._pieces.append(text)
        logprobs = self._shown_logprobs()
        self._open_item["content"][0]["logprobs"] += logprobs
        events.append({"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": logprobs})
        return events

    def _open_message(self) -> list[Event]:
        """Begin a message for text, unless one is open."""
        if self._open_item is not None and self._open_item["type"] == "message":
            return []
        item: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        events = self._open(item)
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        item["content"] = [{**part, "logprobs": []}]
        return [*events, {"type": "response.content_part.added", **self._place(), "part": part}]

    def _open_call(self, name: str) -> list[Event]:
        self._logprobs.clear()  # a call can't show them
        call = {"call_id": new_call_id(), "name": name, "arguments": ""}
        return self._open({"id": new_id("fc_"), "type": "function_call", "status": "in_progress", **call})

    def _open(self, item: Item) -> list[Event]:
        """Begin an item. An item that was open is complete."""
        events = self._close_item("completed")
        self._output.append(item)
        self._open_item = item
        added = {"type": "response.output_item.added", "output_index": len(self._output) - 1, "item": dict(item)}
        return [*events, added]

    def _close_item(self, status: str) -> list[Event]:
        """End the open item with a status. Returns the events; none if no item is open."""
        item = self._open_item
        if item is None:
            return []
        whole = "".join(self._pieces)
        item["status"] = status
        events: list[Event]
        if item["type"] == "function_call":
            item["arguments"] = whole
            done = {"type": "response.function_call_arguments.done", **self._place(in_part=False)}
            events = [{**done, "name": item["name"], "arguments": whole}]
        else:
            part = item["content"][0]
            part["text"] = whole
            part["logprobs"] += self._shown_logprobs()
            place = self._place()
            events = [
                {"type": "response.output_text.done", **place, "text": whole, "logprobs": part["logprobs"]},
                {"type": "response.content_part.done", **place, "part": part},
            ]
        events.append({"type": "response.output_item.done", "output_index": len(self._output) - 1, "item": item})
        self._open_item = None
        self._pieces.clear()
        return events

    def _place(self, *, in_part: bool = True) -> dict[str, Any]:
        """The fields that say where the open item is in the output, and its text in the item."""
        assert self._open_item is not None
        place = {"item_id": self._open_item["id"], "output_index": len(self._output) - 1}
        return {**place, "content_index": 0} if in_part else place

    def _shown_logprobs(self) -> list[orjson.Fragment]:
        """The log-probabilities that no event has shown yet, one JSON entry per token.

        A stream repeats all of them in its last events: 8,192 tokens with 20 alternatives take 10 MB. Each is encoded
        once, when it comes, and only copied later.
        """
        if self._tokenizer is None:
            return []
        logprobs, self._logprobs = self._logprobs, []
        shown = chat_logprobs(self._tokenizer, logprobs)["content"]
        return [orjson.Fragment(orjson.dumps(entry)) for entry in shown]

    def _end(self) -> list[Event]:
        """End the output. Returns the events. An empty output becomes an empty message."""
        self._status = "completed" if self._incomplete is None else "incomplete"
        events = [] if self._output else self._open_message()
        return events + self._close_item(self._status)

    # For the store and its clients

    def snapshot(self) -> Mapping[str, Any]:
        return self._object()

    async def cancel(self) -> None:
        """End the generation. Output so far stays, and the request that waits for the response gets it, too.

        A response that has ended already stays as it is, even while its last events are written.
        """
        if self._status != "in_progress":
            return
        self._events_of_cancel = self._close_item("incomplete")
        self._status = "cancelled"
        await self.generation.cancel()

    def last_state(self) -> bytes:
        content = encode_response(self._object())
        self._keep(content)
        return content

    def close(self) -> None:
        """Keep a stream's response even if its client left early, since the client knows its id. A client that waited
        for the whole answer doesn't, so that response is dropped."""
        try:
            if self._is_streamed and not self._is_kept:
                if self._status == "in_progress":
                    self._close_item("incomplete")
                    self._status = "cancelled"
                self.last_state()
        finally:
            if self._store is not None:
                self._store.end(self.id, None)

    def _keep(self, content: bytes) -> None:
        """Put the response in its last state into the store, which keeps the first that it gets."""
        self._is_kept = True
        if self._store is not None:
            output = tuple(_stored(item) for item in self._output)
            self._store.end(self.id, StoredResponse(self.id, self.owner, content, self._input_items, output))

    def _object(self) -> dict[str, Any]:
        is_ended = self._status != "in_progress"
        output = [dict(item) for item in self._output]
        if (item := self._open_item) is not None:
            so_far = "".join(self._pieces)
            if item["type"] == "message":
                output[-1]["content"] = [{**item["content"][0], "text": so_far}]
            else:
                output[-1]["arguments"] = so_far
        return {
            "id": self.id,
            "object": "response",
            "status": self._status,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "error": self._error,
            "incomplete_details": None if self._status != "incomplete" else {"reason": self._incomplete},
            "output": output,
            "usage": self._usage() if is_ended else None,
            **self._head,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def encode_response(response: Mapping[str, Any]) -> bytes:
    """A whole response as JSON, made piece by piece, so that a worker thread lets the event loop run in between."""
    return encode(response, _DEPTH)


def _stored(item: Item) -> StoredItem:
    """An item without its log-probabilities: later responses parse all items and don't need them."""
    if item["type"] == "message":
        item = {**item, "content": [{**part, "logprobs": []} for part in item["content"]]}
    return StoredItem(item["id"], orjson.dumps(item))
