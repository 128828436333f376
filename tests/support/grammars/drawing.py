"""A small vocabulary, and texts that are drawn from a matcher's masks alone: what a model without sense would say."""

from random import Random
from typing import NamedTuple

import numpy as np

from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.vocabulary import Vocabulary

_LONGER = (
    '{"',
    '":',
    '": ',
    '",',
    '", "',
    '"}',
    "}}",
    "]}",
    '"]',
    "true",
    "false",
    "null",
    " ",
    "  ",
    "\n",
    "\n\n",
    "ab",
)
END, OTHER_END, CONTROL, PADDING = range(256 + len(_LONGER), 260 + len(_LONGER))
NEVER = frozenset((END, OTHER_END, CONTROL))
NAMES = {END: b"<end>", OTHER_END: b"<other>", CONTROL: b"<control>", PADDING: b""}
NUM_IDS = PADDING + 1
_CLOSING = frozenset(token for token in range(NUM_IDS) if token < 256 and chr(token) in '"}]')


def token_bytes(token_id: int) -> bytes:
    """All bytes, some pieces of JSON, two ends of text, a control token, and a row that stands for nothing."""
    if token_id < 256:
        return bytes([token_id])
    return NAMES[token_id] if token_id in NAMES else _LONGER[token_id - 256].encode()


def small_vocabulary() -> Vocabulary:
    return Vocabulary.of(token_bytes, NUM_IDS, NEVER)


class Drawn(NamedTuple):
    text: bytes
    stopped: bool  # by an end, or since it was complete
    tokens: list[int]


def allowed(matcher: GrammarMatcher) -> list[int]:
    """The ids of the next mask."""
    row = np.full((NUM_IDS + 31) // 32, -1, dtype=np.int32)
    matcher.fill(row)
    ids: list[int] = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    assert all(token < NUM_IDS for token in ids)
    return ids


def draw_text(matcher: GrammarMatcher, random: Random, *, most: int = 400) -> Drawn:
    """Tokens at random, those that close something more often, until the text is whole or has `most` tokens."""
    tokens: list[int] = []
    while len(tokens) < most:
        ids = allowed(matcher)
        assert matcher.error is None
        closing = [token for token in ids if token in _CLOSING or matcher.is_end(token)]
        token = random.choice(closing if closing and random.random() < 0.4 else ids)
        if matcher.is_end(token):
            return Drawn(b"".join(map(token_bytes, tokens)), True, tokens)
        tokens.append(token)
        matcher.accept(token)
        assert matcher.error is None
        if matcher.is_complete:
            return Drawn(b"".join(map(token_bytes, tokens)), True, tokens)
    return Drawn(b"".join(map(token_bytes, tokens)), False, tokens)
