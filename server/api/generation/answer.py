"""What chat and text completions have in common as answers: head, chunks, usage.

Doesn't know HTTP or events. The routes' answers say what a choice looks like; `serving` and `sse` use them.
"""

import secrets
import time
from abc import ABC, abstractmethod
from typing import Any

import orjson

from guanaco.server.api.generation.catalog import ServedModel
from guanaco.server.api.generation.choices import Generation
from guanaco.server.api.generation.encode import encode
from guanaco.server.api.generation.protocol import GenerationBody
from guanaco.server.engine.request_stream import TextOutput

_FEW_CHOICES = 8


class Answer(ABC):
    """One answer in the making. `choice_chunk` and `add` are alternatives: an answer is streamed, or collected."""

    id_prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, body: GenerationBody, model: ServedModel) -> None:
        self.id = self.id_prefix + secrets.token_hex(12)
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        options = body.stream_options
        self._usage_at_end = bool(options and options.include_usage)
        self._usage_always = self._usage_at_end and bool(options and options.continuous_usage_stats)
        self.generation: Generation | None = None

    @abstractmethod
    def choice_chunk(self, index: int, output: TextOutput) -> dict[str, Any] | None:
        """What is new of a choice, as an entry of `choices`; None where there is nothing to show yet."""

    @abstractmethod
    def add(self, index: int, output: TextOutput) -> None:
        """Take an output of a choice, for `choices`."""

    @property
    @abstractmethod
    def num_choices(self) -> int: ...

    @property
    @abstractmethod
    def has_logprobs(self) -> bool: ...

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """A choice that was collected, as an entry of `choices`."""

    @property
    def is_large(self) -> bool:
        """Whether the whole answer may take longer to write than the event loop has time."""
        return self.has_logprobs or self.num_choices > _FEW_CHOICES

    def chunk(self, index: int, output: TextOutput) -> dict[str, Any] | None:
        """The chunk for one output. No chunk for an output without text (half a character, say): load tools take each
        chunk with choices for a token."""
        choice = self.choice_chunk(index, output)
        if choice is None:
            return None
        chunk = {**self._head, "object": self.chunk_name, "choices": [choice]}
        if self._usage_at_end:
            chunk["usage"] = self._usage() if self._usage_always else None
        return chunk

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk, without choices, where the client asked for it."""
        if not self._usage_at_end:
            return None
        return {**self._head, "object": self.chunk_name, "choices": [], "usage": self._usage()}

    def encoded(self) -> bytes:
        """The whole answer as JSON, made choice by choice: the entries of one are gone before the next one's come."""
        around = orjson.dumps({**self._head, "object": self.object_name, "choices": [], "usage": self._usage()})
        before, after = around.split(b'"choices":[]', 1)
        choices = b",".join(encode(self.choice(index)) for index in range(self.num_choices))
        return before + b'"choices":[' + choices + b"]" + after

    def _usage(self) -> dict[str, Any]:
        assert self.generation is not None, "an answer is bound to its generation before it is asked for anything"
        return self.generation.usage()
