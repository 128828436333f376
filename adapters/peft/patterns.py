"""Regular expressions from untrusted files, matched in bounded time: with a step budget and without backtracking.

Supports the subset of Python's syntax that adapter configs use: no lookaround, back-reference or flag. With Python's
`re` a malicious pattern could hold the interpreter's lock for hours. Called by `matching` on module names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from guanaco.models.errors import GuanacoError

MAX_REPEAT = 64  # largest bound in {m,n}
MAX_STATES = 4096
# characters read and states visited, by all matchers of a budget together: under a second in Python
MAX_STEPS = 1_500_000

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_CLASSES = {"d": frozenset("0123456789"), "w": _WORD, "s": frozenset(" \t\n\r\f\v")}
_ASSERTIONS = {"A": "start", "Z": "end", "b": "boundary", "B": "no_boundary"}
_BOUNDS = re.compile(r"\{(\d{1,4})?(,)?(\d{1,4})?\}")


class PatternError(GuanacoError, ValueError):
    """A pattern that is outside the subset, malformed, or too expensive to match."""


@dataclass
class Budget:
    """The steps that all matchers together may still use."""

    steps: int = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Use up `steps` steps. Raises PatternError if the budget is exhausted."""
        self.steps -= steps
        if self.steps < 0:
            raise PatternError("takes too long to match")


@dataclass
class _State:
    """The edges of one state: on a character in the set (or, negated, not in it), or without a character if a condition
    holds."""

    characters: list[tuple[frozenset[str], bool, int]] = field(default_factory=list)
    free: list[tuple[str | None, int]] = field(default_factory=list)


_Fragment = Callable[[int, int], None]  # adds its edges between a start state and an end state


class Matcher:
    """`fullmatch(name)` as Python's `re` would decide it, for ASCII names without line breaks.

    Raises PatternError when made from a pattern outside the subset, and from `fullmatch` when the budget is spent.
    """

    def __init__(self, pattern: str, budget: Budget) -> None:
        self._states: list[_State] = []
        self._budget = budget
        self._moves: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}
        start, self._accept = self._new(), self._new()
        parser = _Parser(pattern, self._new, self._states)
        parser.parse()(start, self._accept)
        self._start = frozenset((start,))

    def fullmatch(self, name: str) -> bool:
        """Whether the pattern matches the whole of `name`."""
        self._budget.spend(1 + len(name))
        states, before = self._start, ""
        for character in name:
            key = (states, before, character)
            after = self._moves.get(key)
            if after is None:
                after = self._moves[key] = self._move(*key)
            if not after:
                return False
            states, before = after, character
        return self._accept in self._closure(states, before, "")

    def _new(self) -> int:
        if len(self._states) >= MAX_STATES:
            raise PatternError("is too large")
        self._budget.spend(20)  # what making one costs, in visits
        self._states.append(_State())
        return len(self._states) - 1

    def _move(self, states: frozenset[int], before: str, character: str) -> frozenset[int]:
        return frozenset(
            target
            for state in self._closure(states, before, character)
            for characters, negated, target in self._states[state].characters
            if (character in characters) is not negated
        )

    def _closure(self, states: frozenset[int], before: str, after: str) -> set[int]:
        """All states reachable without reading a character, between characters `before` and `after` ("" at the name's
        ends)."""
        boundary = (before in _WORD) is not (after in _WORD)
        holds = {None: True, "start": not before, "end": not after, "boundary": boundary, "no_boundary": not boundary}
        reached, todo = set(states), list(states)
        while todo:
            state = self._states[todo.pop()]
            self._budget.spend(1 + len(state.free) + len(state.characters))
            for condition, target in state.free:
                if holds[condition] and target not in reached:
                    reached.add(target)
                    todo.append(target)
        return reached


class _Parser:
    """Recursive descent over the pattern; each method returns a fragment for the part that it read."""

    def __init__(self, pattern: str, new: Callable[[], int], states: list[_State]) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0
        self._new = new
        self._states = states

    def parse(self) -> _Fragment:
        whole = self._alternatives()
        if self._at < len(self._text):
            raise PatternError("has a ')' without its '('")
        return whole

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise PatternError("ends too early")
        self._at += 1
        return character

    def _alternatives(self) -> _Fragment:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())

        def draw(start: int, end: int) -> None:
            for branch in branches:
                branch(start, end)

        return draw

    def _sequence(self) -> _Fragment:
        parts: list[_Fragment] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated())

        def draw(start: int, end: int) -> None:
            for part in parts:
                after = self._new()
                part(start, after)
                start = after
            self._states[start].free.append((None, end))

        return draw

    def _repeated(self) -> _Fragment:
        first = self._peek()
        item, repeatable = self._item()
        bounds = self._bounds()
        if bounds is None:
            return item
        if not repeatable:
            raise PatternError(f"repeats {first!r}, which has no width")
        if self._peek() == "?":  # lazy: changes which match is found, not whether there is one
            self._at += 1
        if self._peek() in ("*", "+", "?") or _BOUNDS.match(self._text, self._at):
            raise PatternError("repeats a repetition without a group around it")
        low, high = bounds

        def draw(start: int, end: int) -> None:
            for _ in range(low):
                after = self._new()
                item(start, after)
                start = after
            self._states[start].free.append((None, end))
            if high is None:
                loop, back = self._new(), self._new()
                self._states[start].free.append((None, loop))
                item(loop, back)
                self._states[back].free += [(None, loop), (None, end)]
            else:
                for _ in range(high - low):
                    after = self._new()
                    item(start, after)
                    self._states[after].free.append((None, end))
                    start = after

        return draw

    def _bounds(self) -> tuple[int, int | None] | None:
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._peek() in simple:
            return simple[self._take()]
        if self._peek() != "{":
            return None
        match = _BOUNDS.match(self._text, self._at)
        if match is None or match[0] in ("{}", "{,}"):
            raise PatternError("has a '{' that starts no {m,n}; write \\{ for the character")
        self._at = match.end()
        low = int(match[1] or 0)
        high = int(match[3]) if match[3] else (None if match[2] else low)
        if max(low, high or 0) > MAX_REPEAT:
            raise PatternError(f"repeats something more than {MAX_REPEAT} times")
        if high is not None and high < low:
            raise PatternError(f"has bounds in the wrong order: {match[0]}")
        return low, high

    def _item(self) -> tuple[_Fragment, bool]:
        """(the fragment of one item, whether a repetition may follow it)."""
        character = self._take()
        if character == "(":
            return self._group(), True
        if character == "[":
            return self._on(*self._set()), True
        if character == ".":
            return self._on(frozenset("\n"), True), True
        if character in "^$":
            return self._if("start" if character == "^" else "end"), False
        if character in "*+?":
            raise PatternError(f"has nothing before {character!r} to repeat")
        if character == "\\":
            escaped = self._take()
            if escaped in _ASSERTIONS:
                return self._if(_ASSERTIONS[escaped]), False
            return self._on(*self._escape(escaped)), True
        return self._on(frozenset(character), False), True

    def _group(self) -> _Fragment:
        if self._peek() == "?":
            match = re.compile(r"\?(?::|P<[A-Za-z_][A-Za-z0-9_]*>)").match(self._text, self._at)
            if match is None:
                raise PatternError("uses a look-around, flag or reference, of which none is supported here")
            self._at = match.end()
        self._depth += 1
        if self._depth > 40:
            raise PatternError("is nested too deeply")
        inner = self._alternatives()
        self._depth -= 1
        if self._take() != ")":
            raise PatternError("has a '(' without its ')'")
        return inner

    def _set(self) -> tuple[frozenset[str], bool]:
        negated = self._peek() == "^"
        self._at += negated
        members: set[str] = set()
        first = True
        while first or self._peek() != "]":
            first = False
            low, is_class = self._member()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high, high_is_class = self._member()
                if is_class or high_is_class or min(high) < min(low):
                    raise PatternError("has a bad range in [...]")
                members |= {chr(code) for code in range(ord(min(low)), min(ord(min(high)), 127) + 1)}
            else:
                members |= low
        self._at += 1
        return frozenset(members), negated

    def _member(self) -> tuple[frozenset[str], bool]:
        character = self._take()
        if character != "\\":
            return frozenset(character), False
        escaped = self._take()
        characters, negated = self._escape(escaped)
        if negated:
            raise PatternError(f"has \\{escaped} inside [...], which is not supported here")
        return characters, escaped in _CLASSES

    def _escape(self, character: str) -> tuple[frozenset[str], bool]:
        if character.lower() in _CLASSES:
            return _CLASSES[character.lower()], character.isupper()
        if character.isalnum() or not character.isascii():
            raise PatternError(f"uses \\{character}, which is not supported here")
        return frozenset(character), False

    def _on(self, characters: frozenset[str], negated: bool) -> _Fragment:
        return lambda start, end: self._states[start].characters.append((characters, negated, end))

    def _if(self, condition: str) -> _Fragment:
        return lambda start, end: self._states[start].free.append((condition, end))
