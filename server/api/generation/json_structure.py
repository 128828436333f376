"""Limits on the structure of a JSON body, checked before it is parsed.

A parser holds the interpreter's lock until a body is parsed, which stops every stream: four megabytes of "[]," took
0.9 s. Long strings are cheap; many lists, keys and numbers are not. Called by `body`.
"""

import re

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.errors import bad_request

MAX_ITEMS = 1 << 18  # commas: a prompt of that many token ids
MAX_KEYS = 1 << 15  # colons
MAX_BRACKETS = 1 << 15  # opening ones
MAX_DIGITS = 512  # of one number without a break; the largest float64 has 309
# The inside of a string. Possessive, so each byte is read once, without backtracking.
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
PIECE_BYTES = 1 << 16  # searched in one call, during which the interpreter's lock is held
_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (MAX_DIGITS + 1))  # tried only where a row of digits begins
_STRIDE = 256
_QUOTE = ord('"')


def check_structure(body: bytes) -> None:
    """Raise a 400 for a body with too many items, keys, brackets or digits in a row. Strings don't count."""
    counts = _Counts()
    counts.add(body, 0, len(body))
    if not counts.problem() and not _may_have_long_number(body):
        return  # even with its strings, the body is within the limits
    counts, position = _Counts(), 0
    while (start := body.find(b'"', position)) >= 0:
        _check(counts, body, position, start)
        counts.strings += 1
        position = _end_of_string(body, start + 1)
    _check(counts, body, position, len(body))


def _end_of_string(body: bytes, position: int) -> int:
    """The position behind the closing quote of a string whose inside begins at `position`; the body's end if there is
    no quote."""
    while True:
        end = min(position + PIECE_BYTES, len(body))
        match = _INSIDE.match(body, position, end)
        assert match is not None  # the pattern also matches an empty text
        position = match.end()
        if position < end and body[position] == _QUOTE:
            return position + 1
        if end == len(body):
            return end
        # the string goes on: the piece ends here, or before a backslash whose second character is in the next piece


class _Counts:
    def __init__(self) -> None:
        self.items = self.keys = self.brackets = self.strings = 0

    def add(self, body: bytes, start: int, end: int) -> None:
        self.items += body.count(b",", start, end)
        self.keys += body.count(b":", start, end)
        self.brackets += body.count(b"[", start, end) + body.count(b"{", start, end)

    def problem(self) -> str | None:
        # Each string is a key or an item, so valid JSON has at most one per comma, colon or bracket.
        if self.items > MAX_ITEMS or self.strings > MAX_ITEMS + MAX_KEYS + MAX_BRACKETS:
            return f"more than {MAX_ITEMS} items"
        if self.keys > MAX_KEYS:
            return f"more than {MAX_KEYS} keys"
        return f"more than {MAX_BRACKETS} lists and objects" if self.brackets > MAX_BRACKETS else None


def _check(counts: _Counts, body: bytes, start: int, end: int) -> None:
    """Count the bytes between two strings. Raises a 400 above a limit."""
    counts.add(body, start, end)
    problem = counts.problem()
    if problem is None and end - start > MAX_DIGITS and _has_long_number(body, start, end):
        problem = f"a number of more than {MAX_DIGITS} digits"
    if problem is not None:
        raise bad_request(f"the body has {problem}: send less at once", code=ErrorCode.INVALID_JSON)


def _may_have_long_number(body: bytes) -> bool:
    """Whether the body may hold a number of too many digits. Only every `_STRIDE`-th byte is read first: a long row of
    digits has several of them."""
    is_digit = body[::_STRIDE].translate(_DIGITS)
    return b"\1" in is_digit and _has_long_number(body, 0, len(body))


def _has_long_number(body: bytes, start: int, end: int) -> bool:
    """Whether a number of too many digits begins between `start` and `end`. Searched piece by piece."""
    pieces = range(start, end, PIECE_BYTES)
    return any(_LONG_NUMBER.search(body, at, min(end, at + PIECE_BYTES + MAX_DIGITS)) for at in pieces)


_DIGITS = bytes(byte in b"0123456789" for byte in range(256))
