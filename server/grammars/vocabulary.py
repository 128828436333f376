"""A model's tokens for llguidance: the bytes of each. Control tokens have none, so that no grammar produces them.

An extra token follows the model's own: llguidance's end of text. `matcher` replaces it with the request's end tokens.
Marks are the control tokens that begin or end tool calls. Only a grammar of calls may require them, by their ids.
Used in this process and in the compiler's; imports llguidance when it is first needed.
"""

import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.int32]  # bit i of the words: token id i

CALLS = "tools"  # the kind of grammars that may ask for marks
_END_NAME = b"<guanaco-end>"
_LENGTH = struct.Struct(">H")
_ID = struct.Struct(">I")
_MAX_TOKEN_BYTES = 0xFFFF


@dataclass(frozen=True)
class Vocabulary:
    """tokens: the bytes of each token id of the model; empty for control tokens and for rows without a token.
    marks: the control tokens that begin or end calls, ascending."""

    tokens: tuple[bytes, ...]
    marks: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        token_bytes: Callable[[int], bytes],
        num_ids: int,
        never: Collection[int],
        marks: Collection[int] = (),
    ) -> "Vocabulary":
        """The vocabulary of the ids below num_ids (the model's embedding rows). never: the ids without text: control
        tokens (marks included) and ends of text."""
        tokens = (b"" if index in never else token_bytes(index)[:_MAX_TOKEN_BYTES] for index in range(num_ids))
        return cls(tuple(tokens), tuple(sorted(mark for mark in marks if mark < num_ids)))

    @property
    def num_ids(self) -> int:
        return len(self.tokens)

    @property
    def num_words(self) -> int:
        """The number of words of llguidance's masks, which have one bit more, for the extra end token."""
        return (self.num_ids + 1 + 31) // 32

    @cached_property
    def text_bits(self) -> Bits:
        """The mask of the ids that have text."""
        return bits_of([index for index, token in enumerate(self.tokens) if token], self.num_words)

    @cached_property
    def _bits_with_marks(self) -> Bits:
        bits: Bits = self.text_bits | bits_of(self.marks, self.num_words)
        return bits

    def bits_for(self, kind: str) -> Bits:
        """The mask of the ids that a grammar of this kind may allow. Only a grammar of calls may allow marks: a
        client's own grammar could name one by its id."""
        return self._bits_with_marks if kind == CALLS else self.text_bits

    @cached_property
    def tokenizer(self) -> Any:
        """The vocabulary in llguidance's own form. Making it takes tenths of a second."""
        import llguidance

        wrapper: Any = _Wrapper(self.tokens, self.marks)
        return llguidance.LLTokenizer(wrapper, slices=llguidance.LLTokenizer.json_slices())

    def packed(self) -> bytes:
        """The vocabulary as bytes, for another process."""
        marks = b"".join(map(_ID.pack, (len(self.marks), *self.marks)))
        return marks + b"".join(part for token in self.tokens for part in (_LENGTH.pack(len(token)), token))

    @classmethod
    def unpacked(cls, data: bytes) -> "Vocabulary":
        (num_marks,) = _ID.unpack_from(data)
        marks = tuple(_ID.unpack_from(data, _ID.size * (1 + place))[0] for place in range(num_marks))
        tokens, position = [], _ID.size * (1 + num_marks)
        while position < len(data):
            (length,) = _LENGTH.unpack_from(data, position)
            position += _LENGTH.size
            tokens.append(data[position : position + length])
            position += length
        return cls(tuple(tokens), marks)


def bits_of(ids: Sequence[int], num_words: int) -> Bits:
    """A mask of these ids, int32 [num_words]."""
    flags = np.zeros(num_words * 32, dtype=np.bool_)
    flags[list(ids)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


class _Wrapper:
    """A tokenizer in the form that llguidance expects. llguidance would call it only for forced texts, which
    `building.HEADER` switches off."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: Sequence[bytes], marks: Sequence[int]) -> None:
        self.tokens = [*tokens, _END_NAME]
        for mark in marks:
            self.tokens[mark] = b"<guanaco-mark-%d>" % mark
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [*marks, len(tokens)]

    def __call__(self, _text: str | bytes) -> list[int]:
        return []
