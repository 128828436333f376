"""What the verbs of the command line share: how they end when the operator has to put something right."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from guanaco.server.config import SettingsError

EXIT_USAGE = 2  # something the operator can put right; the last line on stderr says what


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that the operator can put right end the program with one line and exit code 2, without a traceback."""
    from guanaco.adapters.errors import AdapterError
    from guanaco.models.chat_template import TemplateError
    from guanaco.models.errors import ModelError
    from guanaco.server.errors import CommandError

    try:
        yield
    except (SettingsError, CommandError, ModelError, AdapterError, TemplateError) as error:
        print(f"guanaco: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
