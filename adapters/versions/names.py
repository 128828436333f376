"""The rules for adapter names, and the command line's options that begin with one.

Doesn't know what a name stands for. Called by the registry, by its file and by the server.
"""

import os
import re
from pathlib import Path

from guanaco.adapters.errors import AdapterError
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.shown import printable

# One path segment without special parts: a name becomes a model id, a URL part, a metrics label and a sub-folder's
# name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raises AdapterError unless `name` may be an adapter's name."""
    if NAME.fullmatch(name) is None:
        problem = (
            f"{printable(name)!r} cannot be an adapter's name: it must be 1 to 64 letters, digits, dots, underscores "
            "and hyphens, and start with a letter or digit"
        )
        raise AdapterError(ErrorCode.BAD_NAME, problem, "name")


def parse_adapter_option(text: str) -> tuple[str, Path]:
    """`NAME=PATH` of the option --adapter. Raises AdapterError for anything else; the path may contain '='."""
    name, path = parse_name_option(text, "PATH")
    return name, Path(os.path.expanduser(path))


def parse_name_option(text: str, what: str) -> tuple[str, str]:
    """(NAME, rest) of an option `NAME=…`. Raises AdapterError for anything else; the rest may contain more '='."""
    name, separator, value = text.partition("=")
    if not separator or not value:
        raise AdapterError(ErrorCode.BAD_OPTION, f"{printable(text)!r} is not of the form NAME={what}", "adapter")
    check_name(name)
    return name, value
