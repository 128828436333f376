"""Tells control tokens that a template or a raw prompt wrote from those that a message holds.

Works on long texts piece by piece: the interpreter's lock is held for all of one call into a regular expression, and
one text of megabytes would stop every stream. Knows no templates and no ids but those of control tokens. Called by
`tokenizer`.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tokenizers import AddedToken

from guanaco.models.errors import ModelError

PIECE_CHARS = 1 << 16  # looked at in one call; what begins in a piece may end behind it
_JOINED_PIECES = 4096


class ControlTokens:
    """The control tokens of one tokenizer.

    Before rendering, a mark is put inside each control token in the messages; afterwards, what is still whole must be
    the template's and is replaced by a stand-in, and the marks go. The stand-ins are added tokens that nobody can type:
    mark and stand-ins hold random characters from Unicode's private planes, drawn anew in every process.
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
        """Each matches in text exactly where its token would; `real_ids` leads back to the token."""
        added = []
        for _, token in self._tokens:
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added.append(AddedToken(self._stand_ins[token.content], special=False, **flags))
        backend.add_tokens(added)  # at once: each call sorts all added tokens anew
        for index, token in self._tokens:
            self.real_ids[backend.token_to_id(self._stand_ins[token.content])] = index

    def id_of(self, text: str) -> int | None:
        """The id of the token that is spelled `text`."""
        return self._ids.get(text)

    def is_in(self, text: str) -> bool:
        """Whether `text` contains the spelling of any control token."""
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
        """A rendered text with the template's control tokens as stand-ins, the messages' as they were."""
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
        """As `pattern.finditer(text)`. Within one piece all that begins there is found, wherever it ends."""
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
    """The text in pieces that have no mark."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        across = text.find(mark, max(start, end - len(mark) + 1), end + len(mark) - 1)
        end = end if across < 0 else across + len(mark)  # no mark is cut in two
        yield text[start:end].replace(mark, "")
        start = end


def _joined(pieces: Iterator[str]) -> str:
    """The pieces as one text. Millions of them are joined step by step, and none is kept longer than it is needed."""
    steps = []
    while step := list(islice(pieces, _JOINED_PIECES)):
        steps.append("".join(step))
    return "".join(steps)


def _private_text() -> str:
    """Six random characters of a private plane, 96 bits; without case, width or meaning to any text function."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(6))


def longest_match_pattern(tokens: Iterable[str]) -> str:
    """The source of an expression that matches the longest of `tokens` at a place; of none, it matches nowhere.

    It looks at each character once, however many tokens begin alike. A plain list of alternatives tries every token at
    every character: a text of 131 kB and some thousand tokens of a model's would hold the interpreter for seconds.
    Raises ModelError for tokens that continue each other hundreds of times, as no model's do.
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
    first, last = min(tokens), max(tokens)  # what these two share, all share
    prefix = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    by_first: dict[str, set[str]] = {}
    for token in tokens:
        rest = token[len(prefix) :]
        by_first.setdefault(rest[:1], set()).add(rest)
    is_token_itself = by_first.pop("", None) is not None
    branches = "|".join(_pattern_of(rests) for _, rests in sorted(by_first.items()))
    return re.escape(prefix) + f"(?:{branches})" + ("?" if is_token_itself else "")
