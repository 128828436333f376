"""The grammars of answers that must be calls (`tool_choice` "required", or a named function), and of strict tools.

The arguments of each call follow its tool's schema. Calls are written in the model's format, so that the reader always
finds them. Called by `plan`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.tools.definitions import NO_PARAMETERS, Tool
from guanaco.server.api.tools.formats.base import CallFormat, GuidedCall, Marks
from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.spec import Part, schema

MAX_CALLS = 8  # of one answer
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties", "unevaluatedProperties")


def forced_calls(
    tools: Sequence[tuple[int, Tool]], call_format: CallFormat, marks: Marks, *, many: bool, marker: bool
) -> Part:
    """The grammar of one call or, with `many`, of up to MAX_CALLS calls. tools: (index in the request's `tools`, tool).

    marker: whether the answer begins with the format's marker; otherwise the prompt ends with it. Raises a 400 for a
    schema that can't be enforced.
    """
    calls = [_call(tool, index, must=True) for index, tool in tools]
    most = MAX_CALLS if many and call_format.many else 1
    return call_format.forced(calls, marks, most=most, marker=marker)


def strict_calls(tools: Sequence[tuple[int, Tool]], call_format: CallFormat, marks: Marks, *, many: bool) -> Part:
    """The grammar of any text in which everything that begins as a call becomes a call, of a strict tool or of another.
    Raises a 400 if the schema of a strict tool can't be enforced."""
    calls = [_call(tool, index, must=tool.strict) for index, tool in tools]
    return call_format.within_text(calls, marks, many=many)


def _call(tool: Tool, index: int, *, must: bool) -> GuidedCall:
    """One call's name and grammar. must False: if the schema can't be enforced, arguments may be any object."""
    try:
        return GuidedCall(tool.name, schema(closed(tool.parameters)))
    except GrammarError as error:
        if not must:
            return GuidedCall(tool.name, schema({"type": "object"}))
        param = f"tools[{index}].function.parameters"
        raise bad_request(f"{param}: {error}", param, ErrorCode.INVALID_GRAMMAR) from None


def closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's schema that forbids arguments which it doesn't name, since the function would not take them.

    A schema that says something about other arguments, or that combines several schemas, stays as it is.
    """
    if parameters is NO_PARAMETERS or not any(keyword in parameters for keyword in _COMBINING):
        return {**parameters, "type": "object", "additionalProperties": False}
    return {**parameters, "type": "object"}
