"""The base class of all bodies: strict types and finite numbers; and helpers for errors and schemas."""

from typing import Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema
from pydantic_core import PydanticCustomError


def fail(message: str) -> PydanticCustomError:
    """The error that a validator raises. message: for the client, so without the client's value."""
    return PydanticCustomError("value_error", message)


def schema(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema(schema)


class Body(BaseModel):
    """The base class of all bodies: strict types and finite numbers. `generation.fields` treats fields that a body
    doesn't have."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)
