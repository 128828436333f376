"""What all bodies and their values share: strict types, finite numbers, and errors in plain words."""

from typing import Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema
from pydantic_core import PydanticCustomError


def fail(message: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", message)


def schema(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema(schema)


class Body(BaseModel):
    """What all bodies share: strict types and finite numbers. `fields` says what happens to fields that aren't here."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)
