"""Untrusted values and names, made safe for a message or note: one short line without control characters."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

_MAX_CHARS = 60
_MAX_LISTED = 5


def shown(value: Any) -> str:
    """A file's value for a message: one line without control characters, cut after 60 characters."""
    text = repr(value[: _MAX_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_CHARS + 2 else f"{text[:_MAX_CHARS]}…"


def listed(names: Iterable[str]) -> str:
    """Names in a file, for a message: one line with at most five of them, each as `shown` without quotes."""
    return joined(shown(name)[1:].removesuffix("'").removesuffix('"') for name in names)


def joined(texts: Iterable[str]) -> str:
    """Texts that are safe already, as one line with at most five of them."""
    first = list(islice(texts, _MAX_LISTED + 1))
    return ", ".join(first[:_MAX_LISTED]) + (", …" if len(first) > _MAX_LISTED else "")


def printable(text: str) -> str:
    """An untrusted string for a message: one line without control characters, at most 200 characters."""
    short = text if len(text) <= 200 else text[:200] + "..."
    if short.isascii() and short.isprintable():  # nearly every name in a file with thousands
        return short
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in short)
