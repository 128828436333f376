"""Tells control tokens that a chat template wrote from the same text in a message.

Works on long texts piece by piece: a call into a regular expression holds the interpreter's lock, and one text of
megabytes would stop every stream. Knows no templates, and no ids but those of control tokens. Called by `tokenizer`.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tokenizers import AddedToken

from guanaco.models.errors import ModelError

PIECE_CHARS = 1 << 16  # searched in one call; a match that begins in a piece may end behind it
_JOINED_PIECES = 4096


class ControlTokens:
    """The control tokens of one tokenizer.

    Before rendering, `mark` puts a mark inside each control token in the messages. After rendering, a control token
    that is still whole must come from the template: `substitute` replaces it by a stand-in and removes the marks. The
    stand-ins are added tokens. Nobody can type them or the mark: both hold random characters from Unicode's private
    planes, chosen anew in every process.
    """

    def __init__(self, tokens: list[tuple[int, AddedToken]]) -> None:
        self._mark = _private_text()
        self._escaped_mark = json.dumps(self._mark)[1:-1]  # as a template's tojson may write it
        self._tokens = tokens
        self._ids = {token.content: index for index, token in tokens}
        self._stand_ins = {token.content: _private_text() for _, token in tokens}
        self._longest = max(map(len, self._ids), default=0)
        pattern = longest_match_pattern(self._stand_ins)
        self._whole = re.compile(pattern)
        self._starts = re.compile(f"(?={pattern})")
        self.real_ids: dict[int, int] = {}

    def add_stand_ins(self, backend: Any) -> None:
        """Add a stand-in for each control token to the backend. `real_ids` maps its id to the control token's."""
        added = []
        for _, token in self._tokens:
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added.append(AddedToken(self._stand_ins[token.content], special=False, **flags))
        backend.add_tokens(added)  # in one call, since each call sorts all added tokens again
        for index, token in self._tokens:
            self.real_ids[backend.token_to_id(self._stand_ins[token.content])] = index

    def id_of(self, text: str) -> int | None:
        """The id of the control token with this text; None if there is none."""
        return self._ids.get(text)

    def is_in(self, text: str) -> bool:
        """Whether `text` contains the text of any control token."""
        return next(self._found(self._whole, text), None) is not None

    def mark(self, value: Any) -> Any:
        """A copy of a message with the mark after the first character of every control token in its strings."""
        if isinstance(value, str):
            return _joined(self._marked(value))
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def substitute(self, text: str) -> str:
        """A rendered text in which the template's control tokens are stand-ins, and those of messages stay text."""
        return self.unmark(_joined(self._substituted(text)))

    def unmark(self, text: str) -> str:
        """`text` without marks."""
        return _joined(_without(self._escaped_mark, _joined(_without(self._mark, text))))

    def _marked(self, text: str) -> Iterator[str]:
        start = 0
        for match in self._found(self._starts, text):
            yield text[start : match.start() + 1]
            yield self._mark
            start = match.start() + 1
        yield text[start:]

    def _substituted(self, text: str) -> Iterator[str]:
        start = 0
        for match in self._found(self._whole, text):
            yield text[start : match.start()]
            yield self._stand_ins[match[0]]
            start = match.end()
        yield text[start:]

    def _found(self, pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
        """As `pattern.finditer(text)`, piece by piece. A match that begins in a piece may end behind it."""
        start = 0
        while start < len(text):
            end = start + PIECE_CHARS
            for match in pattern.finditer(text, start, end + self._longest):
                if match.start() >= end:
                    break
                yield match
                start = match.end()
            start = max(start, end)


def _without(mark: str, text: str) -> Iterator[str]:
    """The text without `mark`, in pieces."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        across = text.find(mark, max(start, end - len(mark) + 1), end + len(mark) - 1)
        end = end if across < 0 else across + len(mark)  # no mark is cut in two
        yield text[start:end].replace(mark, "")
        start = end


def _joined(pieces: Iterator[str]) -> str:
    """The pieces as one text. They are joined in steps, so that millions of small pieces are never kept at once."""
    steps = []
    while step := list(islice(pieces, _JOINED_PIECES)):
        steps.append("".join(step))
    return "".join(steps)


def _private_text() -> str:
    """Six random characters of a private plane (96 bits), which no text function changes."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(6))


def longest_match_pattern(tokens: Iterable[str]) -> str:
    """A regular expression that matches the longest of `tokens` at a place. Without tokens, it matches nowhere.

    It reads each character once, however many tokens begin alike. A plain list of alternatives tries every token at
    every character: a text of 131 kB and some thousand tokens would hold the interpreter's lock for seconds. Raises
    ModelError if hundreds of tokens are each the beginning of the next one, which no known model has.
    """
    try:
        pattern = _pattern_of(set(filter(None, tokens)))
        re.compile(pattern)
    except RecursionError:
        raise ModelError(
            "the tokenizer has control tokens that begin with each other too often: get it elsewhere"
        ) from None
    return pattern


def _pattern_of(tokens: set[str]) -> str:
    if not tokens:
        return "(?!)"
    if len(tokens) == 1:
        return re.escape(next(iter(tokens)))
    first, last = min(tokens), max(tokens)  # the common beginning of these two is that of all tokens
    prefix = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    by_first: dict[str, set[str]] = {}
    for token in tokens:
        rest = token[len(prefix) :]
        by_first.setdefault(rest[:1], set()).add(rest)
    is_token_itself = by_first.pop("", None) is not None
    branches = "|".join(_pattern_of(rests) for _, rests in sorted(by_first.items()))
    return re.escape(prefix) + f"(?:{branches})" + ("?" if is_token_itself else "")
