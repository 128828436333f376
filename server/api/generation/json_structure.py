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

# A string, or the rest of the body where it has no end: each byte is looked at once. No nesting, no backtracking.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (MAX_DIGITS + 1))  # tried once for each row of digits
_STRIDE = 256


def check_structure(body: bytes) -> None:
    """400 for a body with more items, keys, brackets or digits in a row than there may be, outside of its strings."""
    counts = _Counts()
    counts.add(body, 0, len(body))
    if not counts.problem() and not _may_have_long_number(body):
        return  # there are no more of them outside of the strings than in all of the body
    counts, position = _Counts(), 0
    for match in _STRING.finditer(body):
        _check(counts, body, position, match.start())
        counts.strings += 1
        position = match.end()
    _check(counts, body, position, len(body))


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
    if problem is None and end - start > MAX_DIGITS and _LONG_NUMBER.search(body, start, end):
        problem = f"a number of more than {MAX_DIGITS} digits"
    if problem is not None:
        raise bad_request(f"the body has {problem}: send less at once", code=ErrorCode.INVALID_JSON)


def _may_have_long_number(body: bytes) -> bool:
    """Whether so many digits stand in a row anywhere. One of every `_STRIDE` bytes is looked at first: a long row of
    digits has one of them."""
    is_digit = body[::_STRIDE].translate(_DIGITS)
    return b"\1" in is_digit and _LONG_NUMBER.search(body) is not None


_DIGITS = bytes(byte in b"0123456789" for byte in range(256))
