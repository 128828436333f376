"""Hermes' format, which Qwen and SmolLM2 use too: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, repeated.

A list of calls between the tags is understood as well (SmolLM2's cookbook). The closing tag may be missing at the end
of the answer and before the next opening one.
"""

from collections.abc import Collection, Sequence

from guanaco.server.api.tools.call_object import NoCall
from guanaco.server.api.tools.formats.base import SPACE, CallFormat, Candidate, GuidedCall, Marks, Objects, Status
from guanaco.server.grammars.spec import Part, any_text, at_will, followed, in_order, literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class _Tagged(Candidate):
    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._objects = Objects(names, may_be_list=True)
        self._tail = ""

    def push(self, char: str) -> Status:
        if not self._objects.done:
            call = self._objects.push(char)
            self.current = self._objects.current
            self.pending += [call] if call is not None else []
            return Status.MORE
        if not self._tail and char in SPACE:
            return Status.MORE
        self._tail += char
        if self._tail in (CLOSE, OPEN):  # OPEN is the next call's, if the model forgot the closing tag
            self.calls += self.pending
            self.unread = len(OPEN) if self._tail == OPEN else 0
            return Status.END
        if not CLOSE.startswith(self._tail) and not OPEN.startswith(self._tail):
            raise NoCall
        return Status.MORE

    def finish(self) -> None:
        if not self._objects.done or self._tail:
            raise NoCall
        self.calls += self.pending


class Hermes(CallFormat):
    """See the module."""

    @property
    def control_texts(self) -> tuple[str, ...]:
        return (OPEN, CLOSE)

    def candidate(self, names: Collection[str]) -> Candidate:
        return _Tagged(names)

    def forced(self, calls: Sequence[GuidedCall], marks: Marks, *, most: int, marker: bool) -> Part:
        rest = in_order(literal("\n"), self.object_of(calls), literal("\n"), marks.part(CLOSE))
        tagged = in_order(marks.part(OPEN), rest)
        first = tagged if marker else rest
        return first if most == 1 else followed(first, in_order(literal("\n"), tagged), most=most - 1)

    def within_text(self, calls: Sequence[GuidedCall], marks: Marks, *, many: bool) -> Part:
        call = in_order(literal("\n"), self.object_of(calls), literal("\n"), marks.part(CLOSE))
        return in_order(at_will(in_order(marks.behind_text(OPEN), call), many=many), any_text())

    def written(self, calls: list[tuple[str, str]]) -> str:
        tagged = (f'{OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSE}' for name, arguments in calls)
        return "\n".join(tagged)


HERMES = Hermes(
    "hermes",
    (OPEN,),
    instruction="For each function call, return a json object with function name and arguments within "
    f"{OPEN}{CLOSE} XML tags:",
)
