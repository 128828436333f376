"""Standard streams that accept every text, and one-line ends for Ctrl-C, SIGTERM and a full disk.

Imports the standard library only, since the program can be interrupted while it imports the rest. Used by `entry`,
`classes`, `serve` and `train`.
"""

import codecs
import contextlib
import errno
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report it

# Replacements for the characters in our messages that are not ASCII. Others that a terminal lacks become a question
# mark.
_PLAIN = {
    "→": "->", "…": "...", "·": "-", "›": ">", "×": "x", "–": "-", "—": "-", "’": "'", "‘": "'", "“": '"', "”": '"',
    "\u00a0": " ", "─": "-", "━": "-", "│": "|", "•": "*", "≥": ">=", "≤": "<=",
}  # fmt: skip
_HANDLER = "guanaco.plain"


def end_interrupted() -> NoReturn:
    """End the program with one line that says why. Raises SystemExit."""
    start = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
    print(f"{start}guanaco: interrupted", file=sys.stderr)
    raise SystemExit(EXIT_INTERRUPTED) from None


def heed_sigterm() -> None:
    """Let SIGTERM end this process if it is the first of its container: the kernel hides the signal from such a process
    unless it has a handler, and the container would be killed after a time-out. `serve` drains instead, later."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, end_at_sigterm)


def end_at_sigterm(number: int, _frame: FrameType | None) -> NoReturn:
    """A signal handler: end the process at once, with one line. An exception could be lost in a library that is being
    imported; files that are half-written are removed at the next start, as after a kill."""
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, b"guanaco: ended by SIGTERM\n")
    os._exit(128 + number)


def end_unwritable(error: OSError) -> NoReturn:
    """End the program with one line if the disk is full or the terminal is gone. Any other OSError is raised again."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        raise error
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (the rest of its buffer cannot be written)
    print(f"guanaco: nothing more can be written ({error.strerror}): make room, or write elsewhere", file=sys.stderr)
    raise SystemExit(1) from None


def prepare_streams() -> None:
    """Let the standard streams accept every text in any locale, and open those that are closed."""
    codecs.register_error(_HANDLER, _plain)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`): the number must not go to a socket
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)
    # ASCII input is read as UTF-8, which includes it. Any other encoding is the terminal's. Invalid bytes are refused.
    if hasattr(sys.stdin, "reconfigure"):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else sys.stdin.encoding, errors="strict")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    encoding = error.encoding

    def shown(character: str) -> str:
        for text in (_PLAIN.get(character, "?"), "?"):
            with contextlib.suppress(UnicodeEncodeError):
                text.encode(encoding)
                return text
        return ""

    return "".join(shown(character) for character in error.object[error.start : error.end]), error.end
