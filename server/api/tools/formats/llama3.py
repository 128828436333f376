"""LLaMA 3's format: the answer is `{"name": …, "parameters": {…}}`, perhaps behind `<|python_tag|>`.

More calls may follow, behind `;` or white space. `arguments` is understood for `parameters`. Code behind
`<|python_tag|>` (the format's built-in tools) is no call.
"""

import re
from collections.abc import Collection

from guanaco.server.api.tools.call_object import NoCall
from guanaco.server.api.tools.formats.base import CallFormat, Candidate, Objects, Status
from guanaco.server.grammars.spec import Part

PYTHON_TAG = "<|python_tag|>"


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

    def forced(self, call: Part, *, most: int, marker: bool) -> Part:  # noqa: ARG002 (it has one call, and no marker)
        return call

    def written(self, calls: list[tuple[str, str]]) -> str:
        return "; ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name, arguments in calls)


LLAMA3 = Llama3(
    "llama3", (PYTHON_TAG,), bare=re.compile(r"[ \t\n\r]*(;[ \t\n\r]*)?\{"), argument_key="parameters", many=False
)
