"""Adapters that a request names itself, each with a factor."""

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from guanaco.server.api.values.base import Body, fail

MAX_ADAPTER_SCALE = 16.0  # of one adapter in a mixture, either sign


class AdapterChoice(Body):
    """One adapter of a mixture: delta = scale · its own. Negative scales take away, zero switches off.

    A field besides the two (`weight`, `path`) is refused: it could only change the mixture."""

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
