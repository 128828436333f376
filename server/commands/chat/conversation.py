"""A conversation and the commands that change it: no HTTP, no screen.

Saved as JSON lines, one message each, in the shape that OpenAI's API and fine-tuning files use.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guanaco.server.errors import CommandError

HELP = """\
/adapter NAME   talk to another adapter, or to the base (also /model NAME); without a name: list them
/system TEXT    set the system message; without a text: remove it
/new            forget the conversation
/retry          answer the last message again
/undo           forget the last message and its answer
/save FILE      write the conversation to FILE (JSON lines, one message each)
/load FILE      continue the conversation in FILE
/help           show this
/quit           end (or Ctrl-D)"""
COMMANDS = (*(line.split()[0] for line in HELP.splitlines()), "/model", "/models", "/exit")
_ROLES = ("system", "user", "assistant")
_MAX_FILE_BYTES = 16 << 20


@dataclass
class Conversation:
    """The turns so far. `model` will answer the next message."""

    model: str
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The messages to send: the system message, if there is one, and all turns."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def take_back(self) -> str:
        """Forget the user's last message and its answer. Returns the message. Raises CommandError if there is none."""
        for index in range(len(self.turns) - 1, -1, -1):
            if self.turns[index]["role"] == "user":
                text = self.turns[index]["content"]
                del self.turns[index:]
                return text
        raise CommandError("there is no message yet")

    def save(self, path: Path) -> None:
        """Write all messages to a new file. Raises CommandError if it exists or can't be written."""
        text = "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages())
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise CommandError(f"{path} exists: choose another name, or remove it first") from None
        except OSError as error:
            raise CommandError(f"{path} can't be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Replace the conversation by a saved one. Raises CommandError, which names the invalid line, and then changes
        nothing."""
        messages = [_message(path, number, line) for number, line in enumerate(_lines_of(path), 1) if line.strip()]
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        self.system, self.turns = system, messages


def _lines_of(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise CommandError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8") from None


def _message(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        message = json.loads(line)
        role, content = message["role"], message["content"]
    except (ValueError, KeyError, TypeError):
        role, content = None, None
    if role not in _ROLES or not isinstance(content, str) or (role == "system" and number > 1):
        text = 'expected {"role": "user" or "assistant" (the first line: also "system"), "content": "…"}'
        raise CommandError(f"{path}, line {number}: {text}")
    return {"role": role, "content": content}


def run_command(
    line: str, conversation: Conversation, models: Callable[[], Sequence[str]], say: Callable[[str], None]
) -> str | None:
    """Carry out one line that begins with `/`. Returns a message to send again, or None.

    models: asks the server for its models. say: shows a text. Raises EOFError for /quit, and CommandError for a command
    that is unknown or can't be carried out.
    """
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/quit" | "/exit":
            raise EOFError
        case "/adapter" | "/model" if rest:
            conversation.model = choose(rest, models())
            say(f"{conversation.model} answers now")
        case "/adapter" | "/model" | "/models":
            say("\n".join(f"{'*' if name == conversation.model else ' '} {name}" for name in models()))
        case "/system":
            conversation.system = rest or None
            say("the system message is set" if rest else "there is no system message now")
        case "/new":
            conversation.turns.clear()
            say("a new conversation")
        case "/retry":
            return conversation.take_back()
        case "/undo":
            conversation.take_back()
            say("the last message is forgotten")
        case "/save" | "/load" if not rest:
            raise CommandError(f"{command} needs the name of a file")
        case "/save":
            conversation.save(Path(rest).expanduser())
            say(f"written to {rest}")
        case "/load":
            conversation.load(Path(rest).expanduser())
            say(f"{len(conversation.turns)} messages")
        case "/help":
            say(HELP)
        case _:
            raise CommandError(f"there is no command {command}: /help lists them")
    return None


def choose(name: str | None, names: Sequence[str]) -> str:
    """`name` if the server has it; for None, the first name. Otherwise raises CommandError, which lists the names."""
    if name is None:
        return names[0]
    if name not in names:
        raise CommandError(f"the server has no model {name!r}; it has: {', '.join(names)}")
    return name
