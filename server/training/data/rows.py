"""The common form of all formats of training data: rows, and refusals of lines that can't be rows.

Knows no format and no tokens. Used by the importers, the masks and the code that shows refusals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from guanaco.models.errors import GuanacoError, OperatorError


class RefusalKind(StrEnum):
    """Why a row is not trained on."""

    NOT_JSON = "not json"
    BAD_FIELDS = "bad fields"
    ROLES = "roles out of order"
    EMPTY_ANSWER = "empty answer"
    NOTHING_TO_LEARN = "nothing to learn"
    TOO_LONG = "too long"
    TEMPLATE = "template"
    UNSUPPORTED = "not supported"


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str  # system, user or assistant
    content: str
    learned: bool = False  # whether the model has to learn it: answers only

    def for_template(self) -> dict[str, str]:
        """The message in the form that chat templates read."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Row:
    """One row of training data: a conversation, or a plain text."""

    line: int  # in the file, from 1; in a JSON array the number of the element
    messages: tuple[Message, ...] = ()  # empty: a plain text
    prompt: str = ""  # the beginning of a plain text, which is given and not learned
    text: str = ""  # the rest of a plain text, which is learned

    @property
    def is_chat(self) -> bool:
        """Whether the row is a conversation, which goes through the chat template."""
        return bool(self.messages)

    def content(self) -> tuple[object, ...]:
        """Everything but the place in the file. Two rows with equal contents are duplicates."""
        return (self.messages, self.prompt, self.text)


@dataclass(frozen=True)
class Refusal:
    """A row that can't be trained on, and the reason."""

    line: int
    kind: RefusalKind
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


class RowError(GuanacoError, ValueError):
    """A row that can't be trained on. The message is the reason, and says what to do."""

    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind

    def at(self, line: int) -> Refusal:
        """The refusal for the row on this line."""
        return Refusal(line, self.kind, str(self))


class DataError(OperatorError):
    """A data file that can't be trained on. The message names the file, and says what to do."""


def counted(refusals: Mapping[RefusalKind, int]) -> str:
    """How many rows were refused for each kind of reason, in words."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(refusals.items()))
