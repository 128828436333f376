"""The base class of answers, which `serving` and `sse` use, and the common parts of chat and text completions.

Doesn't know HTTP. Each generating route has a subclass of its own, which writes the route's JSON.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import orjson

from guanaco.server.api.generation.catalog import ServedModel
from guanaco.server.api.generation.choices import Generation
from guanaco.server.api.generation.encode import encode, event
from guanaco.server.api.generation.protocol import GenerationBody
from guanaco.server.api.http.errors import ApiError
from guanaco.server.engine.request_stream import TextOutput

DONE = b"data: [DONE]\n\n"
_EVENT_END = b"}\n\n"
_NO_USAGE = b"null" + _EVENT_END  # the end of a chunk without usage
_FEW_CHOICES = 8  # up to so many, a whole answer is encoded on the loop
_MARK = "\0text\0"  # the place of the text in a frame; no text of a client is in a frame
_FEW_LOGPROBS = 64  # tokens whose log-probabilities are written on the loop


class Answer(ABC):
    """One answer while it is made. It is either streamed (`events`) or collected (`add`, `encoded`). Events are bytes,
    ready to be sent, and end with a blank line."""

    id_prefix: str

    def __init__(self) -> None:
        self.id = self.id_prefix + secrets.token_hex(12)
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        assert self._generation is not None, "an answer is bound to its generation before it is asked for anything"
        return self._generation

    def start(self, generation: Generation) -> None:
        """Bind the answer to the generation that it shows. Called once, before anything else."""
        self._generation = generation

    def first_events(self) -> bytes:
        """The events at the start of a stream, before any output."""
        return b""

    @abstractmethod
    def events(self, index: int, output: TextOutput) -> bytes:
        """The events for a new output of choice `index`; empty if there is nothing to show yet."""

    @abstractmethod
    def last_events(self) -> Iterator[bytes]:
        """The events at the end of a stream, after all outputs. Each piece is made when it is read: a large event comes
        in several pieces."""

    def is_large_output(self, index: int, output: TextOutput) -> bool:  # noqa: ARG002 (of any choice)
        """Whether encoding the events of one output could block the event loop for too long."""
        return len(output.prompt_logprobs) + len(output.logprobs) > _FEW_LOGPROBS  # an echoed prompt's come at once

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream which can't be completed."""
        return event(error.envelope())

    @abstractmethod
    def add(self, index: int, output: TextOutput) -> None:
        """Collect an output of choice `index`, for `encoded`."""

    def end(self) -> None:  # noqa: B027 (most kinds of answer have nothing to do)
        """All outputs were taken. Called on the event loop, before `encoded`."""

    @abstractmethod
    def encoded(self) -> bytes:
        """The whole answer as JSON. Called on a worker thread if `is_large`."""

    @property
    def is_large(self) -> bool:
        """Whether `encoded` could block the event loop for too long."""
        return False

    def close(self) -> None:  # noqa: B027 (most kinds of answer have nothing to give back)
        """Called once when the request has ended: after its last event, by a failure, or as the client left."""


class ChoicesAnswer(Answer):
    """An answer with a list of choices, in the shape that chat and text completions share."""

    object_name: str
    chunk_name: str

    def __init__(self, body: GenerationBody, model: ServedModel) -> None:
        super().__init__()
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._shows_ids = bool(body.return_token_ids)
        self._names_ids = bool(body.return_tokens_as_token_ids)
        self._num_shown, self._num_drawn = body.n, body.num_drawn  # choices per prompt: in the answer, and generated
        self._scores: dict[int, tuple[float, int]] = {}  # choice → (sum of its log-probabilities, number of tokens)
        self._num_scored = body.prompt_logprobs  # alternatives per prompt token; None: the prompt isn't scored
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = self._usage_at_end and bool(options and options.continuous_usage_stats)
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # choice → what its plain events have around the text

    @abstractmethod
    def choice_chunks(self, index: int, output: TextOutput) -> list[dict[str, Any]]:
        """Entries of `choices` for a new output, one for each chunk; none if there is nothing to show yet."""

    @abstractmethod
    def plain_text(self, index: int, output: TextOutput) -> str | None:
        """The text of a plain output, whose chunk has nothing new but its text; None for any other output. Most outputs
        of a stream are plain."""

    @abstractmethod
    def plain_choice(self, index: int, text: str) -> dict[str, Any]:
        """The entry of `choices` in the chunk of a plain output."""

    @property
    @abstractmethod
    def num_choices(self) -> int: ...

    @property
    @abstractmethod
    def has_logprobs(self) -> bool: ...

    def score(self, index: int, output: TextOutput) -> None:
        """Add an output's log-probabilities to the score that `best` compares."""
        total, count = self._scores.get(index, (0.0, 0))
        self._scores[index] = (total + sum(item.logprob for item in output.logprobs), count + len(output.logprobs))

    def best(self) -> list[int]:
        """The indexes of the choices in the answer. For each prompt: the first n, or with `best_of` the n with the
        highest mean log-probability per token, the best first."""
        groups = [range(i, i + self._num_drawn) for i in range(0, self.num_choices, self._num_drawn)]
        if self._num_drawn == self._num_shown:
            return [index for group in groups for index in group]
        return [index for group in groups for index in sorted(group, key=self._mean, reverse=True)[: self._num_shown]]

    def _mean(self, index: int) -> float:
        total, count = self._scores.get(index, (0.0, 0))
        return total / max(1, count)

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """The entry of `choices` for a collected choice."""

    def chunk_fields(self, index: int) -> dict[str, Any]:  # noqa: ARG002 (text completions have none)
        """Further fields of the next chunk of a choice, beside `choices`. Called once for each chunk."""
        return {}

    def whole_fields(self) -> dict[str, Any]:
        """Further fields of the whole answer, beside `choices`."""
        return {}

    @property
    def is_large(self) -> bool:
        return self.has_logprobs or self._num_scored is not None or self.num_choices > _FEW_CHOICES

    def events(self, index: int, output: TextOutput) -> bytes:
        """The chunks for one output, mostly one. An output without text (half a character, say) makes none: load
        testers count each chunk with choices as a token."""
        if (text := self.plain_text(index, output)) is not None:
            return self._plain_event(index, text)
        is_large = self.is_large_output(index, output)
        chunks = [
            {**self._head, "object": self.chunk_name, "choices": [choice]}
            for choice in self.choice_chunks(index, output)
        ]
        if chunks:
            chunks[0] |= self.chunk_fields(index)
        if self._usage_at_end:
            for chunk in chunks:
                chunk["usage"] = self.generation.usage() if self._usage_always else None
        if is_large:
            return b"".join(b"data: " + encode(chunk) + b"\n\n" for chunk in chunks)
        return b"".join(map(event, chunks))

    def _plain_event(self, index: int, text: str) -> bytes:
        """The event of a chunk that has nothing new but a text. Its JSON is made once for each choice, since making it
        takes the event loop longer than anything else that it does for a token."""
        frame = self._frames.get(index)
        if frame is None:
            chunk = {**self._head, "object": self.chunk_name, "choices": [self.plain_choice(index, _MARK)]}
            if self._usage_at_end:
                chunk["usage"] = None
            before, after = event(chunk).rsplit(orjson.dumps(_MARK), 1)
            frame = self._frames[index] = before, after.removesuffix(_NO_USAGE) if self._usage_always else after
        before, after = frame
        usage = orjson.dumps(self.generation.usage()) + _EVENT_END if self._usage_always else b""
        return b"".join((before, orjson.dumps(text), after, usage))

    def last_events(self) -> Iterator[bytes]:
        """The chunk with the usage and without choices, if the client asked for it, and `[DONE]`."""
        if self._usage_at_end:
            last = {**self._head, "object": self.chunk_name, "choices": [], "usage": self.generation.usage()}
            yield event(last)
        yield DONE

    def encoded(self) -> bytes:
        """The whole answer as JSON. Encoded choice by choice, so that only one choice's entries are in memory."""
        usage = self.generation.usage()
        around = orjson.dumps({**self._head, "object": self.object_name, "choices": [], "usage": usage})
        if more := self.whole_fields():
            around = around[:-1] + b"," + encode(more)[1:]
        before, after = around.split(b'"choices":[]', 1)
        choices = b",".join(encode({**self.choice(index), "index": place}) for place, index in enumerate(self.best()))
        return before + b'"choices":[' + choices + b"]" + after
