"""Shared parts of the commands: one-line errors, typed text, addresses and keys."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from guanaco.models.errors import OperatorError
from guanaco.server.errors import CommandError

EXIT_USAGE = 2  # an error of the operator; the last line on stderr says what to do


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line and exit code 2, without a traceback, if the `with` block raises OperatorError."""
    try:
        yield
    except OperatorError as error:
        print(f"guanaco: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None


def typed_text(text: str, what: str) -> str:
    """Text of the command line, read as UTF-8 even if the locale has another encoding. what: its name in the error.

    Raises CommandError if it isn't UTF-8. Python turns bytes that the locale's encoding does not have into lone
    surrogates, which no request can carry.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise CommandError(f"{what} is not valid UTF-8: use a terminal or a file with UTF-8") from None


def server_root(url: str, flag: str = "--url") -> str:
    """The address of a server without a final `/v1`. Raises CommandError, which names `flag`, if it is no address."""
    problem = f"{flag} {url}: expected an address such as http://127.0.0.1:8000 (with or without /v1)"
    try:
        parts = urlsplit(url.strip())
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        raise CommandError(problem) from None
    is_plain = not (parts.query or parts.fragment or parts.username) and url.isascii() and " " not in url.strip()
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port or not is_plain:
        raise CommandError(problem)
    return url.strip().rstrip("/").removesuffix("/v1").rstrip("/")


def bearer(key: str, flag: str) -> bytes:
    """The `Authorization` header for a key. Raises CommandError for characters that a header can't carry."""
    if not key.isprintable():
        raise CommandError(f"{flag}: the key holds a control character, such as the end of a line: remove it")
    return f"Bearer {key.strip()}".encode()
