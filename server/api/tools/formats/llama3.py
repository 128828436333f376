"""LLaMA 3's format: the answer is `{"name": …, "parameters": {…}}`, perhaps behind `<|python_tag|>`.

More calls may follow, behind `;` or white space. `arguments` is understood for `parameters`. Code behind
`<|python_tag|>` (the format's built-in tools) is no call.
"""

import re
from collections.abc import Collection, Sequence

from guanaco.server.api.tools.call_object import NoCall
from guanaco.server.api.tools.formats.base import CallFormat, Candidate, GuidedCall, Marks, Objects, Status
from guanaco.server.grammars.spec import Part, any_text, at_will, in_order, matching, one_of, optional

PYTHON_TAG = "<|python_tag|>"
# The text that `bare` allows before a call, if it is not empty; and texts in which no call begins.
_SEPARATOR = matching(r"[ \t\n\r]*;[ \t\n\r]*|[ \t\n\r]+")
_PLAIN = matching(r"[^ \t\n\r{;](.|\n)*")
_PLAIN_BEHIND = matching(r"[^ \t\n\r{](.|\n)*")  # behind a separator; a second semicolon begins plain text


class _Bare(Candidate):
    def __init__(self, names: Collection[str]) -> None:
        super().__init__(names)
        self._objects = Objects(names, may_be_list=False)

    def push(self, char: str) -> Status:
        call = self._objects.push(char)
        self.current = self._objects.current
        if call is None:
            return Status.MORE
        self.calls.append(call)
        return Status.END

    def finish(self) -> None:
        raise NoCall


class Llama3(CallFormat):
    """See the module."""

    def candidate(self, names: Collection[str]) -> Candidate:
        return _Bare(names)

    def forced(self, calls: Sequence[GuidedCall], marks: Marks, *, most: int, marker: bool) -> Part:  # noqa: ARG002
        return self.object_of(calls)  # `many` is False, and a call needs no marker

    def within_text(self, calls: Sequence[GuidedCall], marks: Marks, *, many: bool) -> Part:
        """A call may begin at the answer's start, behind a call, and behind the tag; other text has to begin in a way
        that is no call's."""
        call = self.object_of(calls)
        tagged = one_of(
            marks.behind_text(PYTHON_TAG, optional(_PLAIN)),
            in_order(_SEPARATOR, marks.behind_text(PYTHON_TAG, optional(_PLAIN_BEHIND))),
        )
        begun = in_order(one_of(call, in_order(_SEPARATOR, call), in_order(tagged, call)))
        rest = optional(one_of(_PLAIN, in_order(_SEPARATOR, optional(_PLAIN_BEHIND))))
        if not many:
            return one_of(in_order(begun, any_text()), rest)
        return in_order(at_will(begun, many=True), rest)

    def written(self, calls: list[tuple[str, str]]) -> str:
        return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)


LLAMA3 = Llama3(
    "llama3", (PYTHON_TAG,), bare=re.compile(r"[ \t\n\r]*(;[ \t\n\r]*)?\{"), argument_key="parameters", many=False
)
