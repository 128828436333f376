"""Fields in which a request names adapters: our own, and those of llama.cpp, SGLang, TGI and LoRAX."""

import hashlib
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from guanaco.server.api.values.base import Body, fail

MAX_ADAPTER_SCALE = 16.0  # of one adapter in a mixture, either sign


class AdapterChoice(Body):
    """One of several adapters of a request; its delta is multiplied by `scale`. A negative scale subtracts it, zero
    switches it off. Any further field (`weight`, `path`) is refused, since it would ask for another result."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)] = 1.0


def _adapter_choices(value: object) -> object:
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise fail("give a list of objects with name and scale; leave the field out for none")
    return tuple(value)


AdapterChoices = Annotated[
    tuple[AdapterChoice, ...],
    BeforeValidator(_adapter_choices),
    WithJsonSchema({"type": "array", "items": AdapterChoice.model_json_schema()}),
]


def number_of(name: str) -> int:
    """The number by which llama.cpp's clients name an adapter. It is a hash of the name, so it stays the same when
    other adapters are loaded or removed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


class NumberedAdapter(Body):
    """One of llama.cpp's `lora`: GET /lora-adapters lists the numbers."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[int, Field(ge=0, lt=2**31)]
    scale: Annotated[float, Field(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)]


def _numbered(value: object) -> object:
    if value is not None and not isinstance(value, list):
        raise fail("give a list of objects with id and scale; GET /lora-adapters lists the ids")
    return None if value is None else tuple(value)


NumberedAdapters = Annotated[
    tuple[NumberedAdapter, ...] | None,
    BeforeValidator(_numbered),
    WithJsonSchema({"type": ["array", "null"], "items": NumberedAdapter.model_json_schema()}),
]


def _adapter_name(value: object) -> object:
    if value is not None and not isinstance(value, str):
        raise fail("give the name of one adapter, as GET /v1/models lists it")
    return value


AdapterName = Annotated[
    Annotated[str, Field(min_length=1, max_length=256)] | None,
    BeforeValidator(_adapter_name),
    WithJsonSchema({"type": ["string", "null"]}),
]
