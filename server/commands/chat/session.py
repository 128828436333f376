"""The loop of `guanaco chat`: reads what the user types, sends it, shows the answer.

With a terminal it has an editable prompt with history, several lines, completion, and Markdown. Without one each line
of the input is a message, only the answers go to standard output, and the first error ends the program.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape

from guanaco.server.commands.chat.client import AnswerFigures, ChatClient
from guanaco.server.commands.chat.conversation import COMMANDS, Conversation, choose, run_command
from guanaco.server.commands.chat.screen import MarkdownStream
from guanaco.server.commands.terminal import write_text
from guanaco.server.errors import CommandError

_NOT_TEXT = "the input is not valid UTF-8: send UTF-8"
# Characters that a terminal would carry out as commands (escape sequences, carriage returns, bells) are replaced.
_CONTROL = {code: "\ufffd" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
# Shows a prompt and reads one message. EOFError at the end of the input; KeyboardInterrupt for Ctrl-C.
Reader = Callable[[str], str]

_HINT = "/help lists the commands · Alt-Enter starts a new line · Ctrl-C stops an answer · Ctrl-D ends"


class ChatSession:
    """One conversation with one server."""

    def __init__(self, client: ChatClient, *, system: str | None, plain: bool, history: Path | None) -> None:
        self._client = client
        self._system = system
        self._plain = plain
        self._history = history

    def run(self, name: str | None) -> None:
        """Talk until the end of the input. Raises CommandError if the server can't be reached or has no such model."""
        conversation = Conversation(choose(name, self._client.models()), self._system)
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._talk(conversation, Console(highlight=False), _line_editor(self._client, self._history))
        else:
            self._answer_all(conversation)

    def _talk(self, conversation: Conversation, console: Console, read: Reader) -> None:
        console.print(f"[bold]{escape(conversation.model)}[/] at {escape(self._client.url)}\n[dim]{_HINT}[/]")
        while True:
            try:
                text: str | None = read(f"{conversation.model} › ").strip()
                if text and text.startswith("/"):
                    text = run_command(text, conversation, self._client.models, lambda said: _dim(console, said))
                if text:
                    self._answer(conversation, text, console)
            except EOFError:
                return
            except KeyboardInterrupt:
                console.print("[dim]Ctrl-D ends[/]")
            except UnicodeDecodeError:
                console.print(f"[red]{escape(_NOT_TEXT)}[/]")
            except CommandError as error:
                console.print(f"[red]{escape(str(error))}[/]")

    def _answer(self, conversation: Conversation, text: str, console: Console) -> None:
        """Send one message and show the answer. If Ctrl-C stops the answer, the part that came is kept; after an error
        neither message is kept."""
        message = {"role": "user", "content": text}
        figures, answer, stopped = AnswerFigures(time.perf_counter()), "", False
        raw = self._client.stream(conversation.model, [*conversation.messages(), message], figures)
        pieces = (piece.translate(_CONTROL) for piece in raw)
        try:
            if self._plain:
                for piece in pieces:
                    answer += piece
                    write_text(piece)
            else:
                with MarkdownStream(console) as screen:
                    for piece in pieces:
                        answer += piece
                        screen.write(piece)
        except KeyboardInterrupt:
            stopped = True
        if self._plain:
            write_text("\n")
        conversation.turns += [message, {"role": "assistant", "content": answer}]
        _dim(console, "stopped" if stopped else figures.line())

    def _answer_all(self, conversation: Conversation) -> None:
        """Answer each line of the input. Output of commands goes to standard error, so that standard output has only
        the answers."""
        console = Console(highlight=False, stderr=True)
        try:
            for raw in _lines(sys.stdin):
                text: str | None = raw.strip()
                if text and text.startswith("/"):
                    text = run_command(text, conversation, self._client.models, lambda said: _dim(console, said))
                if text:
                    self._answer_plainly(conversation, text)
        except EOFError:
            return

    def _answer_plainly(self, conversation: Conversation, text: str) -> None:
        message = {"role": "user", "content": text}
        answer = ""
        figures = AnswerFigures(time.perf_counter())
        for piece in self._client.stream(conversation.model, [*conversation.messages(), message], figures):
            answer += piece
            write_text(piece)
        write_text("\n")
        conversation.turns += [message, {"role": "assistant", "content": answer}]


def _dim(console: Console, text: str) -> None:
    if text:
        console.print(text, style="dim", markup=False)


def _lines(stream: TextIO) -> Iterator[str]:
    try:
        yield from stream
    except UnicodeDecodeError:
        raise CommandError(_NOT_TEXT) from None


def _line_editor(client: ChatClient, history: Path | None) -> Reader:
    """A prompt with history, completion of commands and names, and several lines (Alt-Enter, or pasted)."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    past: Any = InMemoryHistory()
    if history is not None:
        try:
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            history.touch(mode=0o600)
            past = FileHistory(history)
        except OSError:
            pass  # the home directory can't be written: the history then lasts only for this conversation
    completer = WordCompleter(lambda: [*COMMANDS, *_names(client)], sentence=False, WORD=True)
    session: PromptSession[str] = PromptSession(
        history=past,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="… ",
        completer=completer,
        complete_while_typing=False,
    )
    return lambda prompt: session.prompt(prompt)


def _names(client: ChatClient) -> list[str]:
    try:
        return client.models()
    except CommandError:
        return []
