"""The base classes of formats and of their candidates, and the reader of call objects that all formats share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from guanaco.server.api.tools.call_object import CallObject, NoCall
from guanaco.server.grammars.spec import Part, any_text, control_token, in_order, literal, one_of, text_until

SPACE = " \t\n\r"


class Status(Enum):
    """The state of a candidate after a character."""

    MORE = auto()  # it may become a call
    CALLS = auto()  # `calls` has new ones, and more may come
    END = auto()  # that character was its last; `calls` may have new ones


class Call(NamedTuple):
    name: str
    arguments: str  # JSON of an object


class Candidate(ABC):
    """Reads a text that begins as calls do. Adds complete calls to `calls`."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.calls: list[Call] = []
        self.pending: list[Call] = []  # complete calls that count only when the text that must follow them has come
        self.unread = 0  # how many of the last characters belong to the text behind the candidate
        self.current: CallObject | None = None  # the call that is being read, to stream its arguments

    @property
    def name(self) -> str | None:
        """The name of the call that is being read, once it is known."""
        return None if self.current is None else self.current.name

    @abstractmethod
    def push(self, char: str) -> Status:
        """Read the next character. Raises NoCall if it can't belong to calls."""

    @abstractmethod
    def finish(self) -> None:
        """Handle the end of the text: add calls that count without their end to `calls`. Raises NoCall if none does."""


class GuidedCall(NamedTuple):
    """A function that a grammar lets the model call, and what its arguments have to be."""

    name: str
    arguments: Part


@dataclass(frozen=True)
class Marks:
    """How a model writes the fixed texts of a format: as control tokens, where its vocabulary has them as such."""

    control_id: Callable[[str], int | None]

    def part(self, text: str) -> Part:
        """The text, or its control token."""
        token = self.control_id(text)
        return literal(text) if token is None else control_token(token)

    def behind_text(self, mark: str, before: Part | None = None) -> Part:
        """Any text up to the first mark, and the mark. If the mark is a control token, its spelled-out text counts too:
        the reader finds both. before: the grammar of the text before the mark, which may be empty; None: any text."""
        token, spelled = self.control_id(mark), text_until(mark, before)
        if token is None:
            return spelled
        return one_of(in_order(any_text() if before is None else before, control_token(token)), spelled)


@dataclass(frozen=True)
class CallFormat(ABC):
    """A way of writing calls.

    markers: texts that begin calls anywhere. If a marker is a control token, the engine must show it. bare: how calls
    begin without a marker, at the start of the answer or behind a call; None: they never do.
    """

    name: str
    markers: tuple[str, ...]
    bare: re.Pattern[str] | None = None
    argument_key: str = "arguments"
    many: bool = True  # whether an answer may have several calls
    instruction: str = "To call a function, write its name and its arguments as JSON in this form, and nothing else:"

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Texts of calls that are control tokens in some vocabularies. The engine must show them."""
        return self.markers

    @abstractmethod
    def candidate(self, names: Collection[str]) -> Candidate:
        """A new candidate for the text behind a marker. Without a marker, its first character is the opening brace."""

    def object_of(self, calls: Sequence[GuidedCall]) -> Part:
        """The grammar of one of these calls, written as a JSON object."""
        return one_of(
            *(
                in_order(literal(f'{{"name": "{call.name}", "{self.argument_key}": '), call.arguments, literal("}"))
                for call in calls
            )
        )

    @abstractmethod
    def forced(self, calls: Sequence[GuidedCall], marks: Marks, *, most: int, marker: bool) -> Part:
        """The grammar of 1 to `most` of these calls, for answers that must be calls.

        marker: whether the first marker belongs to the answer; otherwise the prompt ends with it.
        """

    @abstractmethod
    def within_text(self, calls: Sequence[GuidedCall], marks: Marks, *, many: bool) -> Part:
        """The grammar of any text in which every beginning of a call becomes one of these calls.

        many: any number of calls; otherwise one, and the text behind it is free."""

    @abstractmethod
    def written(self, calls: list[tuple[str, str]]) -> str:
        """Calls in the text that a model of this format writes, for default prompts. calls: (name, JSON arguments)."""


class Objects:
    """Reads one call object, or a list of them, character by character. Candidates use it."""

    def __init__(self, names: Collection[str], *, may_be_list: bool) -> None:
        self._names = names
        self._may_be_list = may_be_list
        self._is_list = False
        self._wants = "first"  # or object, separator
        self.current: CallObject | None = None
        self.done = False

    def push(self, char: str) -> Call | None:
        """Read a character. Returns the call that it completes, if any. `done` after the object's or list's end.

        Raises NoCall if the character can't belong to a call.
        """
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
