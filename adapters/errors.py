"""What can be wrong with an adapter. `code` is stable and machine-readable; the message names the field or tensor."""


class AdapterError(Exception):
    """A refused adapter: `code` in snake_case (`rank_too_large`), `field` the config field or tensor at fault."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


def printable(text: str) -> str:
    """A stranger's string for a message: one line, no control characters, 200 characters at most."""
    short = text if len(text) <= 200 else text[:200] + "..."
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in short)
