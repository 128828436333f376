"""Mistral's format: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`.

Newer models write `[TOOL_CALLS]name[ARGS]{…}` for each call, some with `[CALL_ID]…` in between or without `[ARGS]`:
these are understood, too.
"""

from collections.abc import Collection, Sequence

from guanaco.server.api.tools.call_object import CallObject, NoCall
from guanaco.server.api.tools.formats.base import SPACE, Call, CallFormat, Candidate, GuidedCall, Marks, Objects, Status
from guanaco.server.grammars.spec import (
    MAX_REPEATS,
    Part,
    any_text,
    at_will,
    in_order,
    literal,
    one_of,
    optional,
    repeated,
)

MARKER = "[TOOL_CALLS]"
_ARGS, _CALL_ID = "[ARGS]", "[CALL_ID]"
_MAX_HEAD_CHARS = 256  # of name, id and markers before the arguments


class _Behind(Candidate):
    """Reads the text behind the marker: a list of call objects, or a name and its arguments."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._objects: Objects | None = None
        self._head = ""  # name, perhaps an id, perhaps [ARGS]

    @property
    def name(self) -> str | None:
        if self.current is not None or self._objects is not None:
            return super().name
        name, bracket, _ = self._head.partition("[")
        return name.rstrip() if bracket else None

    def push(self, char: str) -> Status:
        if self._objects is not None:
            return self._in_list(char)
        if self.current is not None:
            return self._in_arguments(char)
        if not self._head and char in SPACE:
            return Status.MORE
        if not self._head and char == "[":
            self._objects = Objects(self.names, may_be_list=True)
            return self._in_list(char)
        if char == "{":
            self._begin_arguments()
            return Status.MORE
        self._head += char
        self._check_head()
        return Status.MORE

    def finish(self) -> None:
        raise NoCall

    def _in_list(self, char: str) -> Status:
        assert self._objects is not None, "the list has begun"
        call = self._objects.push(char)
        self.current = self._objects.current
        if call is not None:
            self.calls.append(call)
        return Status.END if self._objects.done else Status.CALLS if call is not None else Status.MORE

    def _check_head(self) -> None:
        """Raise NoCall unless the head can become a function's name, followed only by markers, an id and white
        space."""
        name, bracket, rest = self._head.partition("[")
        if len(self._head) > _MAX_HEAD_CHARS:
            raise NoCall
        if not bracket:
            bare = name.rstrip()
            if bare not in self.names and (bare != name or not any(known.startswith(bare) for known in self.names)):
                raise NoCall
            return
        if name.rstrip() not in self.names:
            raise NoCall
        markers = bracket + rest
        if _ARGS.startswith(markers) or _CALL_ID.startswith(markers) or markers.rstrip() == _ARGS:
            return
        if not markers.startswith(_CALL_ID):
            raise NoCall

    def _begin_arguments(self) -> None:
        """Begin to read the arguments, with a call object that has the name already."""
        name, bracket, rest = self._head.partition("[")
        markers = bracket + rest
        if name.rstrip() not in self.names or not (
            markers.rstrip() in ("", _ARGS) or (markers.startswith(_CALL_ID) and markers.rstrip().endswith(_ARGS))
        ):
            raise NoCall
        self.current = CallObject(self.names)
        for char in f'{{"name":"{name.rstrip()}","arguments":{{':
            self.current.push(char)

    def _in_arguments(self, char: str) -> Status:
        assert self.current is not None, "the arguments have begun"
        self.current.push(char)
        if not self.current.arguments_ended:
            return Status.MORE
        self.calls.append(Call(self.current.name or "", self.current.arguments))
        self.current = None
        return Status.END


class Mistral(CallFormat):
    """See the module."""

    @property
    def control_texts(self) -> tuple[str, ...]:
        return (MARKER, _ARGS, _CALL_ID)

    def candidate(self, names: Collection[str]) -> Candidate:
        return _Behind(names)

    def forced(self, calls: Sequence[GuidedCall], marks: Marks, *, most: int, marker: bool) -> Part:
        listed = repeated(self.object_of(calls), separator=", ", most=most)
        return in_order(*([marks.part(MARKER)] if marker else []), literal(" ["), listed, literal("]"))

    def within_text(self, calls: Sequence[GuidedCall], marks: Marks, *, many: bool) -> Part:
        """Allows both ways of writing calls: the model writes them as it was trained."""
        most = MAX_REPEATS if many else 1
        listed = in_order(
            optional(literal(" ")),
            literal("["),
            repeated(self.object_of(calls), separator=", ", most=most),
            literal("]"),
        )
        behind_name = one_of(literal(_ARGS), marks.part(_ARGS))  # a model may spell what it has a token for
        named = (in_order(literal(call.name), behind_name, call.arguments) for call in calls)
        begun = in_order(marks.behind_text(MARKER), one_of(listed, *named))
        return in_order(at_will(begun, many=many), any_text())

    def written(self, calls: list[tuple[str, str]]) -> str:
        return f"{MARKER}[" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]"


MISTRAL = Mistral("mistral", (MARKER,))
