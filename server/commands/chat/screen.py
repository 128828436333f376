"""Shows Markdown while it arrives: finished blocks are printed once, and the last block is redrawn."""

import re
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.MULTILINE)
_DRAWS_PER_SECOND = 12


class MarkdownStream:
    """A context manager: `write` takes pieces of Markdown, and leaving the context prints the rest.

    A terminal can't redraw lines that have scrolled away. So a complete block (followed by a blank line outside of code
    fences) is printed once, and only the unfinished block is redrawn, at most its last screenful.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._live = Live(console=console, refresh_per_second=_DRAWS_PER_SECOND, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._tail.strip():
            self._console.print(Markdown(self._tail))

    def write(self, piece: str) -> None:
        self._tail += piece
        done, self._tail = finished_blocks(self._tail)
        if done.strip():
            self._console.print(Markdown(done))
            self._console.print()
        rows = max(1, self._console.height - 2)
        self._live.update(Markdown("\n".join(self._tail.splitlines()[-rows:])))


def finished_blocks(text: str) -> tuple[str, str]:
    """Split Markdown into (finished blocks, rest). Later text can't change the finished blocks.

    A list may go on after a blank line, so a block that is followed by an indented line or a list item is not finished.
    """
    for match in reversed(list(re.finditer(r"\n[ \t]*\n", text))):
        before, after = text[: match.end()], text[match.end() :]
        first = after.split("\n", 1)[0]
        if not after or re.match(r"\s|[-*+] |\d+[.)] ", first) or re.fullmatch(r"[-*+]|\d+[.)]?", first):
            continue
        if _in_fence(before):
            continue
        return before, after
    return "", text


def _in_fence(text: str) -> bool:
    """Whether a code fence is open at the end of the text."""
    open_fence = ""
    for match in _FENCE.finditer(text):
        marks = match.group(1)
        if not open_fence:
            open_fence = marks
        elif marks[0] == open_fence[0] and len(marks) >= len(open_fence):
            open_fence = ""
    return bool(open_fence)
