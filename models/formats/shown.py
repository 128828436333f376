"""A stranger's values and names, made fit for a message or a note: one bounded line, nothing unescaped."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

_MAX_CHARS = 60
_MAX_LISTED = 5


def shown(value: Any) -> str:
    """A value of a file for a message or a note: one line without control characters, 60 characters and a mark."""
    text = repr(value[: _MAX_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_CHARS + 2 else f"{text[:_MAX_CHARS]}…"


def listed(names: Iterable[str]) -> str:
    """Names that a file gives, for a message or a note: one line, at most five, each as `shown` without quotes."""
    return joined(shown(name)[1:].removesuffix("'").removesuffix('"') for name in names)


def joined(texts: Iterable[str]) -> str:
    """Texts that may be shown as they are, five at most."""
    first = list(islice(texts, _MAX_LISTED + 1))
    return ", ".join(first[:_MAX_LISTED]) + (", …" if len(first) > _MAX_LISTED else "")


def printable(text: str) -> str:
    """A stranger's string for a message: one line, no control characters, 200 characters at most."""
    short = text if len(text) <= 200 else text[:200] + "..."
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in short)
