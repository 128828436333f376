"""How much structure a JSON body may have, counted before it is parsed.

A parser holds the interpreter's lock for all of a body, and so stops every stream: four megabytes of "[]," took 0.9 s.
Bytes are cheap; lists, keys and numbers are not. Doesn't parse. Called by `body`.
"""

import re

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.errors import bad_request

MAX_ITEMS = 1 << 18  # commas: a prompt of that many token ids
MAX_KEYS = 1 << 15  # colons
MAX_BRACKETS = 1 << 15  # opening ones
MAX_DIGITS = 512  # of one number in a row; the largest float64 has 309

# What stands within a string: each byte is looked at once. No nesting, no backtracking.
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
PIECE_BYTES = 1 << 16  # looked at in one call, for all of which the interpreter's lock is held
_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (MAX_DIGITS + 1))  # tried once for each row of digits
_STRIDE = 256
_QUOTE = ord('"')


def check_structure(body: bytes) -> None:
    """400 for a body with more items, keys, brackets or digits in a row than there may be, outside of its strings."""
    counts = _Counts()
    counts.add(body, 0, len(body))
    if not counts.problem() and not _may_have_long_number(body):
        return  # there are no more of them outside of the strings than in all of the body
    counts, position = _Counts(), 0
    while (start := body.find(b'"', position)) >= 0:
        _check(counts, body, position, start)
        counts.strings += 1
        position = _end_of_string(body, start + 1)
    _check(counts, body, position, len(body))


def _end_of_string(body: bytes, position: int) -> int:
    """Behind the closing quote of a string whose inside begins at `position`; the body's end where there is none."""
    while True:
        end = min(position + PIECE_BYTES, len(body))
        match = _INSIDE.match(body, position, end)
        assert match is not None  # it matches nothing, too
        position = match.end()
        if position < end and body[position] == _QUOTE:
            return position + 1
        if end == len(body):
            return end
        # the piece ends here, or before a backslash whose partner is in the next one


class _Counts:
    def __init__(self) -> None:
        self.items = self.keys = self.brackets = self.strings = 0

    def add(self, body: bytes, start: int, end: int) -> None:
        self.items += body.count(b",", start, end)
        self.keys += body.count(b":", start, end)
        self.brackets += body.count(b"[", start, end) + body.count(b"{", start, end)

    def problem(self) -> str | None:
        # Each string is a key or an item; in no JSON do two of them follow each other without a comma or a colon.
        if self.items > MAX_ITEMS or self.strings > MAX_ITEMS + MAX_KEYS + MAX_BRACKETS:
            return f"more than {MAX_ITEMS} items"
        if self.keys > MAX_KEYS:
            return f"more than {MAX_KEYS} keys"
        return f"more than {MAX_BRACKETS} lists and objects" if self.brackets > MAX_BRACKETS else None


def _check(counts: _Counts, body: bytes, start: int, end: int) -> None:
    """Count a stretch between two strings."""
    counts.add(body, start, end)
    problem = counts.problem()
    if problem is None and end - start > MAX_DIGITS and _has_long_number(body, start, end):
        problem = f"a number of more than {MAX_DIGITS} digits"
    if problem is not None:
        raise bad_request(f"the body has {problem}: send less at once", code=ErrorCode.INVALID_JSON)


def _may_have_long_number(body: bytes) -> bool:
    """Whether so many digits stand in a row anywhere. One of every `_STRIDE` bytes is looked at first: a long row of
    digits has one of them."""
    is_digit = body[::_STRIDE].translate(_DIGITS)
    return b"\1" in is_digit and _has_long_number(body, 0, len(body))


def _has_long_number(body: bytes, start: int, end: int) -> bool:
    """Whether one begins in a piece, and is there far enough to be too long; piece by piece."""
    pieces = range(start, end, PIECE_BYTES)
    return any(_LONG_NUMBER.search(body, at, min(end, at + PIECE_BYTES + MAX_DIGITS)) for at in pieces)


_DIGITS = bytes(byte in b"0123456789" for byte in range(256))
