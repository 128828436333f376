"""What llguidance knows of a model's tokens: the bytes of each, and that control tokens are none of a grammar's.

One made-up token stands behind the model's own: llguidance's end of text. `matcher` replaces it with the ends that a
request has. Used on both sides of the compiler's process; imports llguidance when it is first needed.
"""

import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.int32]  # bit i of the words: token id i

_END_NAME = b"<guanaco-end>"
_LENGTH = struct.Struct(">H")
_MAX_TOKEN_BYTES = 0xFFFF


@dataclass(frozen=True)
class Vocabulary:
    """tokens: the bytes of each of the model's ids; of control tokens, and of rows without a token, none."""

    tokens: tuple[bytes, ...]

    @classmethod
    def of(cls, token_bytes: Callable[[int], bytes], num_ids: int, never: Collection[int]) -> "Vocabulary":
        """The ids below num_ids (the model's embedding rows). never: control tokens, and ends of text."""
        return cls(tuple(b"" if index in never else token_bytes(index)[:_MAX_TOKEN_BYTES] for index in range(num_ids)))

    @property
    def num_ids(self) -> int:
        return len(self.tokens)

    @property
    def num_words(self) -> int:
        """Of a mask of llguidance's, with the made-up end."""
        return (self.num_ids + 1 + 31) // 32

    @cached_property
    def text_bits(self) -> Bits:
        """The ids that stand for text."""
        return bits_of([index for index, token in enumerate(self.tokens) if token], self.num_words)

    @cached_property
    def tokenizer(self) -> Any:
        """llguidance's own form of it; takes tenths of a second."""
        import llguidance

        wrapper: Any = _Wrapper(self.tokens)
        return llguidance.LLTokenizer(wrapper, slices=llguidance.LLTokenizer.json_slices())

    def packed(self) -> bytes:
        """For another process."""
        return b"".join(part for token in self.tokens for part in (_LENGTH.pack(len(token)), token))

    @classmethod
    def unpacked(cls, data: bytes) -> "Vocabulary":
        tokens, position = [], 0
        while position < len(data):
            (length,) = _LENGTH.unpack_from(data, position)
            position += _LENGTH.size
            tokens.append(data[position : position + length])
            position += length
        return cls(tuple(tokens))


def bits_of(ids: Sequence[int], num_words: int) -> Bits:
    """A mask of these ids."""
    flags = np.zeros(num_words * 32, dtype=np.bool_)
    flags[list(ids)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


class _Wrapper:
    """A tokenizer as llguidance takes it. It calls it for what a grammar forces, which the grammars switch off."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*tokens, _END_NAME]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [len(tokens)]

    def __call__(self, _text: str | bytes) -> list[int]:
        return []
