"""One call as a model writes it, `{"name": …, "arguments": {…}}`, read character by character as it comes.

Strict JSON: an object that can't become a call is recognised at its first wrong character, so that text is held back no
longer than needed. Doesn't know the text around the object. Used by the formats.
"""

import json
import re
from collections.abc import Collection

from guanaco.models.errors import GuanacoError

ARGUMENT_KEYS = ("arguments", "parameters")
MAX_DEPTH = 128  # nested lists and objects; a deeper object is not a call
MAX_ATOM_CHARS = 512  # of a number
_KEYS = ("name", *ARGUMENT_KEYS, "id", "type")
_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_BEGINS = re.compile(r"-?(?:0|[1-9][0-9]*)?(?:(?<=[0-9])\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?")
_LITERALS = ("true", "false", "null")


class NoCall(GuanacoError):
    """The text so far can't become a call."""


class CallObject:
    """Reads one object, character by character, from the opening brace on. `done` after the closing brace."""

    def __init__(self, names: Collection[str]) -> None:
        """names: the functions that may be called."""
        self._names = names
        self._text: list[str] = []
        self._closers: list[str] = []  # the closing bracket of each open list and object
        self._state = "value"
        self._key = ""
        self._seen: set[str] = set()  # keys of the object itself
        self._token_start = 0  # where the string, number or literal that is being read begins in `_text`
        self._is_key = False
        self._hex_left = 0
        self.name: str | None = None
        self.done = False
        self.arguments_start: int | None = None  # where the arguments begin in `_text`
        self._arguments_end: int | None = None

    @property
    def arguments_ended(self) -> bool:
        return self._arguments_end is not None

    @property
    def arguments(self) -> str:
        """The arguments of a complete call as a JSON object, in the model's own text."""
        if self.arguments_start is None:
            return "{}"
        written = "".join(self._text[self.arguments_start : self._arguments_end])
        return str(json.loads(written)) if written.startswith('"') else "{}" if written == "null" else written

    def arguments_from(self, offset: int) -> str:
        """The arguments so far, from character `offset` on."""
        assert self.arguments_start is not None, "the arguments have begun"
        return "".join(self._text[self.arguments_start + offset : self._arguments_end])

    def push(self, char: str) -> None:
        """Read the next character. Raises NoCall if it can't belong to a call."""
        self._text.append(char)
        match self._state:
            case "string":
                self._in_string(char)
            case "escape":
                self._in_escape(char)
            case "atom":
                self._in_atom(char)
            case _:
                if char not in _SPACE:
                    self._between(char)

    def _between(self, char: str) -> None:
        state, position = self._state, len(self._text) - 1
        if state in ("value", "value or end"):
            if state == "value or end" and char == "]":
                self._close(char)
            else:
                self._begin_value(char, position)
        elif state in ("key", "key or end"):
            if char == '"':
                self._state, self._token_start = "string", position
                self._is_key = True
            elif char == "}" and state == "key or end":
                self._close(char)
            else:
                raise NoCall
        elif state == "colon":
            if char != ":":
                raise NoCall
            self._state = "value"
        elif char == ",":  # after a value
            self._state = "key" if self._closers[-1] == "}" else "value"
        elif char == self._closers[-1]:
            self._close(char)
        else:
            raise NoCall

    def _begin_value(self, char: str, position: int) -> None:
        if not self._closers and char != "{":
            raise NoCall
        if len(self._closers) == 1:
            self._begin_member(char, position)
        self._token_start, self._is_key = position, False
        if char in "{[":
            if len(self._closers) >= MAX_DEPTH:
                raise NoCall
            self._closers.append("}" if char == "{" else "]")
            self._state = "key or end" if char == "{" else "value or end"
        elif char == '"':
            self._state = "string"
        else:
            self._state = "atom"
            self._check_atom()

    def _begin_member(self, char: str, position: int) -> None:
        """Begin the value of one of the call's own keys."""
        if self._key in ARGUMENT_KEYS:
            if char not in '{"n':
                raise NoCall
            self.arguments_start = position
        elif self._key in ("name", "type") and char != '"':
            raise NoCall

    def _close(self, char: str) -> None:
        if self._closers.pop() != char:
            raise NoCall
        self._end_value()

    def _end_value(self) -> None:
        depth = len(self._closers)
        self._state = "after"
        if depth == 1 and self._key in ARGUMENT_KEYS:
            self._end_arguments()
        elif depth == 0:
            if self.name is None:
                raise NoCall
            self.done = True

    def _end_arguments(self) -> None:
        self._arguments_end = len(self._text)
        written = "".join(self._text[self.arguments_start :])
        if written.startswith('"') and not is_object(json.loads(written)):
            raise NoCall

    def _in_string(self, char: str) -> None:
        if char == '"':
            if self._is_key:
                self._end_key()
            else:
                if len(self._closers) == 1 and self._key == "name":
                    self.name = self._token()[1:-1]
                    if self.name not in self._names:
                        raise NoCall
                self._end_value()
            return
        if char < " ":
            raise NoCall
        if char == "\\":
            self._state = "escape"
        if len(self._closers) == 1:
            self._check_plain()

    def _check_plain(self) -> None:
        """Raise NoCall if a key, the name or the type can't become one of the known ones."""
        if self._is_key:
            known: Collection[str] = _KEYS
        elif self._key in ("name", "type"):
            known = self._names if self._key == "name" else ("function",)
        else:
            return
        so_far = self._token()[1:]
        if not any(name.startswith(so_far) for name in known):
            raise NoCall

    def _in_escape(self, char: str) -> None:
        if self._hex_left:
            if char not in "0123456789abcdefABCDEF":
                raise NoCall
            self._hex_left -= 1
        elif char == "u":
            self._hex_left = 4
        elif char not in '"\\/bfnrt':
            raise NoCall
        if not self._hex_left:
            self._state = "string"

    def _end_key(self) -> None:
        if len(self._closers) == 1:
            self._key = self._token()[1:-1]
            other = ARGUMENT_KEYS if self._key in ARGUMENT_KEYS else (self._key,)
            if self._key not in _KEYS or self._seen.intersection(other):
                raise NoCall
            self._seen.add(self._key)
        self._state = "colon"

    def _in_atom(self, char: str) -> None:
        if char in _SPACE or char in ",]}":
            atom = "".join(self._text[self._token_start : -1])
            if atom not in _LITERALS and not _NUMBER.fullmatch(atom):
                raise NoCall
            self._text.pop()  # the value ended before this character
            self._end_value()
            self._text.append(char)
            if char not in _SPACE:
                self._between(char)
        else:
            self._check_atom()

    def _check_atom(self) -> None:
        atom = self._token()
        if len(atom) > MAX_ATOM_CHARS or not (
            _NUMBER_BEGINS.fullmatch(atom) or any(name.startswith(atom) for name in _LITERALS)
        ):
            raise NoCall

    def _token(self) -> str:
        return "".join(self._text[self._token_start :])


def is_object(text: str) -> bool:
    """Whether a text is exactly one JSON object."""
    try:
        text.encode()  # half a surrogate pair is no character
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
