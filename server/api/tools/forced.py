"""The grammars of answers that have to be calls (`tool_choice` "required", or a named function), and of strict tools.

Each call's arguments follow its tool's schema, in the words of the format that the model writes calls in, so that the
reader always finds them. Called by `plan`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.tools.definitions import NO_PARAMETERS, Tool
from guanaco.server.api.tools.formats.base import CallFormat
from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.spec import Part, in_order, literal, one_of, schema

MAX_CALLS = 8  # of one answer
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties", "unevaluatedProperties")


def forced_calls(tools: Sequence[tuple[int, Tool]], call_format: CallFormat, *, many: bool, marker: bool) -> Part:
    """One call or, with `many`, up to MAX_CALLS calls of these tools, each with its index in the request's `tools`.

    marker: whether the answer begins with the format's marker; it may stand at the end of the prompt. 400 for a schema
    that can't be enforced.
    """
    calls = one_of(*(_call(tool, index, call_format.argument_key, must=True) for index, tool in tools))
    most = MAX_CALLS if many and call_format.many else 1
    return call_format.forced(calls, most=most, marker=marker)


def strict_calls(tools: Sequence[tuple[int, Tool]], call_format: CallFormat, *, many: bool) -> Part:
    """Any text in which whatever begins as a call becomes one, of a tool that is not strict, too. 400 for the schema of
    a strict tool that can't be enforced."""
    calls = one_of(*(_call(tool, index, call_format.argument_key, must=tool.strict) for index, tool in tools))
    return call_format.within_text(calls, many=many)


def _call(tool: Tool, index: int, key: str, *, must: bool) -> Part:
    """must: whether the schema has to be enforced; else arguments are any object where it can't be."""
    try:
        arguments = schema(closed(tool.parameters))
    except GrammarError as error:
        if not must:
            any_object = schema({"type": "object"})
            return in_order(literal(f'{{"name": "{tool.name}", "{key}": '), any_object, literal("}"))
        param = f"tools[{index}].function.parameters"
        raise bad_request(f"{param}: {error}", param, ErrorCode.INVALID_GRAMMAR) from None
    return in_order(literal(f'{{"name": "{tool.name}", "{key}": '), arguments, literal("}"))


def closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool's schema without arguments that it doesn't name: a function would not take them.

    A schema that says something else about them, or is made of several, stays as it is.
    """
    if parameters is NO_PARAMETERS or not any(keyword in parameters for keyword in _COMBINING):
        return {**parameters, "type": "object", "additionalProperties": False}
    return {**parameters, "type": "object"}
