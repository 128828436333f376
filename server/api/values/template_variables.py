"""Variables that a client sends for the chat template, besides the server's own."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from guanaco.server.api.values.base import fail, schema

MAX_VARIABLES = 32
MAX_VARIABLES_BYTES = 16 << 10  # of all of them as JSON
_NAME = re.compile("[A-Za-z][A-Za-z0-9_]{0,63}")
# Names that the server gives to a template, or that Jinja defines. A client's value would take their place.
RESERVED = frozenset(
    (
        *("messages", "message", "conversation", "tools", "documents", "add_generation_prompt"),
        *("continue_final_message", "chat_template", "tokenize", "return_dict", "return_tensors", "padding"),
        *("truncation", "max_length", "raise_exception", "strftime_now", "namespace", "range", "dict", "cycler"),
        *("joiner", "lipsum", "loop", "self", "caller", "varargs", "kwargs"),
    )
)


def _variables(value: object) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise fail("give an object: names of the template's variables, and their values")
    if len(value) > MAX_VARIABLES:
        raise fail(f"at most {MAX_VARIABLES} variables")
    for name in value:
        if not _NAME.fullmatch(name):
            raise fail("a variable's name must have 1 to 64 letters, digits and underscores, and begin with a letter")
        if name in RESERVED or name.endswith(("_token", "_tokens")):
            raise fail("a variable has the name of one that the server gives the template: leave it out")
    if len(json.dumps(value)) > MAX_VARIABLES_BYTES:
        raise fail(f"at most {MAX_VARIABLES_BYTES} bytes as JSON")
    return value


TemplateVariables = Annotated[
    Mapping[str, Any] | None,
    BeforeValidator(_variables),
    schema(type=["object", "null"], additionalProperties=True, maxProperties=MAX_VARIABLES),
]
