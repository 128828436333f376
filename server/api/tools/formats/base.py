"""What the reader of a model's text needs of a format, and the candidate that all of our formats share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from guanaco.server.api.tools.call_object import CallObject, NoCall
from guanaco.server.grammars.spec import Part

SPACE = " \t\n\r"


class Status(Enum):
    """What a candidate is after a character."""

    MORE = auto()  # it may become a call
    CALLS = auto()  # `calls` has new ones, and more may come
    END = auto()  # the last character was its last; `calls` may have new ones


class Call(NamedTuple):
    name: str
    arguments: str  # JSON of an object


class Candidate(ABC):
    """Text that began as calls begin. `calls` grows by those that are complete."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.calls: list[Call] = []
        self.pending: list[Call] = []  # complete calls that count when what belongs behind them has come
        self.unread = 0  # of the last characters, those that belong to what follows
        self.current: CallObject | None = None  # that is being read, for streams of arguments

    @abstractmethod
    def push(self, char: str) -> Status:
        """Take the next character. Raises NoCall where it can't belong to calls."""

    @abstractmethod
    def finish(self) -> None:
        """The text is over. `calls` gets what may count without its end. Raises NoCall where that is nothing."""


@dataclass(frozen=True)
class CallFormat(ABC):
    """A way of writing calls.

    markers: texts that begin calls wherever they stand. Where a marker is a control token, the engine has to show it.
    bare: how calls begin without a marker, where the answer or the text behind a call begins; None: never so.
    """

    name: str
    markers: tuple[str, ...]
    bare: re.Pattern[str] | None = None
    argument_key: str = "arguments"
    guides_text: bool = False  # whether `within_text` is there
    many: bool = True  # whether an answer may have several calls
    instruction: str = "To call a function, write its name and its arguments as JSON in this form, and nothing else:"

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Texts of calls that are control tokens in some vocabularies: the engine has to show them."""
        return self.markers

    @abstractmethod
    def candidate(self, names: Collection[str]) -> Candidate:
        """A new candidate for what stands behind a marker; a bare one's first character is the opening brace."""

    @abstractmethod
    def forced(self, call: Part, *, most: int, marker: bool) -> Part:
        """1 to `most` calls as the reader finds them, for answers that have to be calls; `call` is one call's object.

        marker: whether the first marker belongs to the answer; else it stands at the end of the prompt.
        """

    def within_text(self, call: Part, *, many: bool) -> Part:
        """Any text in which each marker is followed by a call; `call` as above."""
        raise NotImplementedError(f"calls of the format {self.name} have no grammar in a free text")

    @abstractmethod
    def written(self, calls: list[tuple[str, str]]) -> str:
        """Calls, as (name, arguments as JSON), as a model of this format writes them: for default prompts."""


class Objects:
    """One call object, or a list of them, read by characters: a part of candidates."""

    def __init__(self, names: Collection[str], *, may_be_list: bool) -> None:
        self._names = names
        self._may_be_list = may_be_list
        self._is_list = False
        self._wants = "first"  # or object, separator
        self.current: CallObject | None = None
        self.done = False

    def push(self, char: str) -> Call | None:
        """Take a character; the call that it completes. `done` after the last character of object or list."""
        if self.current is not None:
            self.current.push(char)
            if not self.current.done:
                return None
            call = Call(self.current.name or "", self.current.arguments)
            self.current, self._wants, self.done = None, "separator", not self._is_list
            return call
        if char in SPACE:
            return None
        if char == "{" and self._wants != "separator":
            self.current = CallObject(self._names)
            self.current.push(char)
        elif char == "[" and self._wants == "first" and self._may_be_list:
            self._is_list, self._wants = True, "object"
        elif char == "," and self._wants == "separator":
            self._wants = "object"
        elif char == "]" and self._wants == "separator":
            self.done = True
        else:
            raise NoCall
        return None
