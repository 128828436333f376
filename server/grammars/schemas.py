"""Prepares JSON schemas for compiling: refuses keywords that can't be enforced, and drops those that only describe.

Every keyword that is kept is enforced. The answer's JSON has no white space except at most one space after a comma or
colon; otherwise a model could write blanks forever. Called by `spec`.
"""

import json
from collections.abc import Mapping
from typing import Any

from guanaco.server.grammars.errors import GrammarError

MAX_DEPTH = 64  # levels of nested schemas
MAX_SCHEMAS = 20_000  # subschemas of one schema

_ONE_SPACE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

_ONE = frozenset(("additionalProperties", "additionalItems", "items"))  # keywords whose value is a schema
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))  # keywords whose value is a list of schemas
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_MAPS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions")
)  # keywords whose value maps names to schemas
_ENFORCED = frozenset(
    (
        *("type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("$ref", "$id", "id", "$schema", "$anchor"),
    )
)
# JSON Schema's own keywords that limit values but can't be enforced here. A request with one is refused.
_UNSUPPORTED = frozenset(
    (
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        *("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
    )
)
_DESCRIBING = frozenset(("default", "example", "examples", "discriminator", "xml", "externalDocs", "x-guidance"))
FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
# OpenAPI's formats, and formats that only describe a text's purpose: they limit no text.
_DESCRIBING_FORMATS = frozenset(("int32", "int64", "float", "double", "decimal", "byte", "binary", "password", "path"))


def lark_json(schema: Mapping[str, Any] | bool, *, compact: bool = False) -> str:
    """The schema as one line of JSON for Lark's `%json`. Raises GrammarError."""
    if schema is False:
        raise GrammarError("the schema is false: it allows no value")
    if not isinstance(schema, Mapping | bool):
        raise GrammarError("the schema must be a JSON object")
    cleaner = _Cleaner()
    cleaned = cleaner.clean({} if schema is True else schema, 1)
    assert isinstance(cleaned, dict)
    if not cleaner.combines:
        _close(cleaned)
    return json.dumps({**cleaned, "x-guidance": _COMPACT if compact else _ONE_SPACE})


def _close(schema: object) -> None:
    """Forbid properties that a schema doesn't name, in it and in its subschemas, since a small model would add
    properties without end.

    JSON that the closed schema allows is valid by the original one, too. llama.cpp and xgrammar also close objects. A
    schema stays open if it names no properties, says anything about others, or requires more than it names.
    """
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in _MAPS and isinstance(value, dict):
            _close(list(value.values()))
        elif keyword in _ONE or keyword in _LISTS:
            _close(value)
    names = schema.get("properties")
    speaks = "additionalProperties" in schema or "patternProperties" in schema
    if not isinstance(names, dict) or not names or speaks:
        return
    required, least = schema.get("required", ()), schema.get("minProperties", 0)
    if isinstance(required, list) and not set(map(str, required)) <= names.keys():
        return
    if not isinstance(least, int) or least > len(names):
        return
    schema["additionalProperties"] = False


class _Cleaner:
    """Prepares one schema, and counts its subschemas."""

    def __init__(self) -> None:
        self._num_schemas = 0
        self.combines = False  # whether several schemas together describe one object somewhere

    def clean(self, schema: object, depth: int) -> dict[str, Any] | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise GrammarError("the schema is not valid: a subschema must be an object, true or false")
        self._num_schemas += 1
        if depth > MAX_DEPTH:
            raise GrammarError(f"the schema is nested more than {MAX_DEPTH} levels deep: use fewer")
        if self._num_schemas > MAX_SCHEMAS:
            raise GrammarError(f"the schema has more than {MAX_SCHEMAS} subschemas: use fewer")
        if refused := sorted(_UNSUPPORTED & schema.keys()):
            raise GrammarError(f"the schema uses {', '.join(refused)}, which this server cannot enforce: leave it out")
        cleaned: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in _ONE and not isinstance(value, list):
                cleaned[keyword] = self.clean(value, depth + 1)
            elif keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
                cleaned[keyword] = self._list(keyword, value, depth)
            elif keyword in _MAPS:
                cleaned[keyword] = self._map(keyword, value, depth)
            elif keyword in _ENFORCED or (isinstance(value, Mapping) and keyword not in _DESCRIBING):
                cleaned[keyword] = value  # a $ref may point into objects of any name
        self._settle_format(cleaned)
        if "discriminator" in schema and "oneOf" in cleaned and "anyOf" not in cleaned:
            cleaned["anyOf"] = cleaned.pop("oneOf")  # with the discriminator no two branches can match
        several = "oneOf" in cleaned or len(cleaned.get("allOf", ())) > 1
        self.combines |= several or ("properties" in cleaned and any(keyword in cleaned for keyword in _COMBINING))
        return cleaned

    def _list(self, keyword: str, value: object, depth: int) -> list[dict[str, Any] | bool]:
        if not isinstance(value, list) or not value:
            raise GrammarError(f"the schema is not valid: {keyword} must be a list of schemas, not an empty one")
        return [self.clean(item, depth + 1) for item in value]

    def _map(self, keyword: str, value: object, depth: int) -> dict[str, dict[str, Any] | bool]:
        if not isinstance(value, Mapping):
            raise GrammarError(f"the schema is not valid: {keyword} must be an object of schemas")
        return {name: self.clean(item, depth + 1) for name, item in value.items()}

    def _settle_format(self, cleaned: dict[str, Any]) -> None:
        if (name := cleaned.get("format")) is None or name in FORMATS:
            return
        if not isinstance(name, str) or name not in _DESCRIBING_FORMATS:
            known = ", ".join(FORMATS)
            raise GrammarError(f"the schema has a format that this server cannot enforce: format may be {known}")
        del cleaned["format"]
