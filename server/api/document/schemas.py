"""Short names for JSON schemas. The schemas of the answers are written with them."""

from collections.abc import Iterable
from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def const(value: object) -> Schema:
    return {"const": value}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def made_of(optional: Iterable[str] = (), /, **properties: Schema) -> Schema:
    """An object whose properties are all there, but for the optional ones."""
    return {"type": "object", "properties": properties, "required": sorted(set(properties) - set(optional))}
