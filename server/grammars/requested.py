"""The fields of a request → the `Grammar` that its answer must follow: OpenAI's field, and vLLM's new and old ones.

Knows the fields' values, not HTTP. Raises GrammarError with the field at fault. Called by `serving` in the API.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.spec import Grammar, choice, json_object, json_schema, regex, written

FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# The fields of structured_outputs: those that make a grammar, the one that changes it, and those that may only have
# values that change nothing (field → these values).
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_COMPACT = "disable_any_whitespace"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "disable_fallback": (True, False),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
    "_backend": (),
    "_backend_was_auto": (True, False),
}


def requested(fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar of a request; None if its fields set none. fields: name in FIELDS → value."""
    found: dict[str, Grammar] = {}
    for name in FIELDS:
        value = fields.get(name)
        if value is not None and (grammar := _within(name, _READERS[name], value)) is not None:
            found[name] = replace(grammar, param=name)
    if len(found) > 1:
        first, second = list(found)[:2]
        raise GrammarError(f"{first} and {second} both say what the answer must look like: give one of them", second)
    return next(iter(found.values()), None)


def _within(param: str, read: Callable[[Any], Grammar | None], value: object) -> Grammar | None:
    """The result of `read` for the value. Its GrammarError gets the field's name."""
    try:
        return read(value)
    except GrammarError as error:
        path = param if error.param is None else f"{param}.{error.param}"
        raise GrammarError(str(error), path) from None


def _response_format(value: object) -> Grammar | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str):
        raise GrammarError("give an object with a type: text, json_object or json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_object()
    if kind != "json_schema":
        raise GrammarError("must be text, json_object or json_schema", "type")
    return _within("json_schema", _named_schema, value.get("json_schema"))


def _named_schema(value: object) -> Grammar:
    if not isinstance(value, Mapping):
        raise GrammarError("give an object with name and schema")
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GrammarError("must be 1 to 64 letters, digits, underscores or dashes", "name")
    if not isinstance(value.get("strict"), bool | None):
        raise GrammarError("must be true, false or null; both are enforced", "strict")
    if not isinstance(value.get("description"), str | None):
        raise GrammarError("must be a string", "description")
    if value.get("schema") is None:
        return json_object()
    grammar = _within("schema", _schema, value["schema"])
    assert grammar is not None
    return grammar


def _schema(value: object) -> Grammar:
    if not isinstance(value, Mapping | bool):
        raise GrammarError("a JSON schema must be an object")
    return json_schema(value)


def _structured_outputs(value: object) -> Grammar | None:
    if not isinstance(value, Mapping):
        raise GrammarError(f"give an object with one of {', '.join(_KINDS)}")
    for name, neutral in _NEUTRAL.items():
        if not any(value.get(name) is allowed for allowed in (None, *neutral)):
            raise GrammarError("is not supported by this server", name)
    if unknown := [name for name in value if name not in (*_KINDS, *_NEUTRAL, _COMPACT)]:
        raise GrammarError(f"{len(unknown)} of its fields are not known here: give one of {', '.join(_KINDS)}")
    compact = value.get(_COMPACT)
    if not isinstance(compact, bool | None):
        raise GrammarError("must be true or false", _COMPACT)
    given = [name for name in _KINDS if value.get(name) is not None and value.get(name) is not False]
    if len(given) > 1:
        raise GrammarError(f"give one of {', '.join(_KINDS)}, not {' and '.join(given)}")
    if not given:
        raise GrammarError(f"give one of {', '.join(_KINDS)}")
    readers: Mapping[str, Callable[[Any], Grammar | None]] = {
        "json": lambda schema: _json(schema, compact=bool(compact)),
        "regex": _regex,
        "choice": _choice,
        "grammar": _written,
        "json_object": _flag,
    }
    return _within(given[0], readers[given[0]], value[given[0]])


def _json(value: object, *, compact: bool = False) -> Grammar:
    """The grammar of a JSON schema that is given as an object or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise GrammarError("a JSON schema that is given as text must be valid JSON") from None
    if not isinstance(value, Mapping | bool):
        raise GrammarError("a JSON schema must be an object, or the text of one")
    return json_schema(value, compact=compact)


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _regex(value: object) -> Grammar:
    if not isinstance(value, str):
        raise GrammarError("must be a string: a regular expression")
    return regex(value)


def _choice(value: object) -> Grammar:
    if not isinstance(value, list):
        raise GrammarError("must be a list of texts")
    return choice(value)


def _written(value: object) -> Grammar:
    if not isinstance(value, str):
        raise GrammarError("must be a string: a grammar in Lark or GBNF")
    return written(value)


def _flag(value: object) -> Grammar | None:
    if value is not True:
        raise GrammarError("must be true or false")
    return json_object()


_READERS: Mapping[str, Callable[[Any], Grammar | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _written,
}
