"""The bytes of a request body → a validated request, or a 400 that names the field.

Parses the raw bytes strictly: no NaN or infinity, no lone surrogates, no duplicate keys, no byte-order mark, no
conversions between types. Doesn't know what the fields mean. Error messages never hold what the client sent.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from guanaco.models.error_codes import ErrorCode
from guanaco.server.api.generation.fields import RouteFields, asks_for_nothing
from guanaco.server.api.generation.ignored import Ignored, ignored_fields
from guanaco.server.api.generation.json_structure import check_structure
from guanaco.server.api.http.errors import ApiError, ClientGone, bad_request
from guanaco.server.api.http.intake import HeldBody

Model = TypeVar("Model", bound=BaseModel)

_MAX_MESSAGE = 300


async def read_body(request: Request, max_bytes: int, held: HeldBody) -> bytes:
    """Read the whole body, and count its bytes in `held`.

    Raises ApiError: 413 above `max_bytes` (announced or received), 415 for anything but plain JSON, 503 or 429 if the
    memory for bodies is full. Raises ClientGone if the client leaves before the body's end.
    """
    headers = request.headers
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise ApiError(415, ErrorCode.UNSUPPORTED_ENCODING, "compressed bodies are not read: send the JSON as it is")
    kind, _, parameters = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise ApiError(
            415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, "send the body as JSON, with `Content-Type: application/json`"
        )
    if "charset" in parameters.lower() and "utf-8" not in parameters.lower():
        raise ApiError(415, ErrorCode.UNSUPPORTED_MEDIA_TYPE, "send the JSON in UTF-8")
    announced = headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal():
        if int(announced) > max_bytes:
            raise _too_large(max_bytes)
        held.expect(int(announced))
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        if len(body) + len(piece) > max_bytes:
            raise _too_large(max_bytes)
        held.add(len(piece))
        body += piece
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, ErrorCode.REQUEST_TOO_LARGE, f"the body is larger than {max_bytes} bytes, the most this server reads"
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises a 400 if it is not strict JSON, or above the limits of `json_structure`."""
    check_structure(body)
    if not body:
        raise bad_request("the body is empty: send JSON, {} at least", code=ErrorCode.INVALID_JSON)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError:
        # pydantic's own message says where, but it can quote the body
        raise bad_request("the body is not valid JSON in UTF-8", code=ErrorCode.INVALID_JSON) from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code=ErrorCode.INVALID_JSON)
    json.loads(body, object_pairs_hook=_refuse_duplicates, parse_int=_pass_over, parse_float=_refuse_infinite)
    return value


def _pass_over(digits: str) -> None:
    """Parse no integer: the second reading only checks keys and fractions, and large integers would take long."""


def _refuse_infinite(digits: str) -> None:
    """Raise a 400 for a number beyond float64, even in an ignored field: other readers could read another number."""
    if math.isinf(float(digits)):
        raise bad_request("the body has a number beyond the range of float64", code=ErrorCode.INVALID_JSON)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Raise a 400 for a repeated key: two readers of one body could understand two different requests."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise bad_request("the body has an object with the same key twice", code=ErrorCode.INVALID_JSON)


@dataclass(frozen=True)
class TakenFields:
    """A body's fields under our names. Those that are refused by name are left only with values that change nothing."""

    data: dict[str, Any]
    ignored: Ignored
    renamed: Mapping[str, str]  # our name → the name that the client gave

    def validate(self, model: type[Model]) -> Model:
        """The body as `model`. Raises a 400 for the first wrong field, by the name that the client used."""
        return validate(model, self.data, self.renamed)


def take_fields(data: dict[str, Any], route: RouteFields) -> TakenFields:
    """Sort the fields of a body as `route` says.

    Raises a 400 for an unsupported field that would change the answer, and for two names of one field with two values.
    """
    for name in route.refused.keys() & data.keys():
        if not asks_for_nothing(data[name], route.refused[name]):
            advice = f": {route.instead[name]}" if name in route.instead else ""
            code = route.codes.get(name, ErrorCode.UNSUPPORTED_PARAMETER)
            raise bad_request(f"{name} is not supported by this server{advice}", name, code)
    ignored = ignored_fields(data, route)
    ours = {name: value for name, value in data.items() if name not in route.aliases}
    renamed: dict[str, str] = {}
    for alias in sorted(route.aliases.keys() & data.keys()):
        name, value = route.aliases[alias], data[alias]
        if value is None:
            continue
        other = ours.get(name)
        if other is not None and (other != value or type(other) is not type(value)):
            raise bad_request(f"{alias} and {renamed.get(name, name)} mean the same: give one of them", alias)
        ours[name], renamed[name] = value, alias
    return TakenFields(ours, ignored, renamed)


def validate(model: type[Model], data: dict[str, Any], renamed: Mapping[str, str] = MappingProxyType({})) -> Model:
    """The data as `model`. Raises a 400 for the first wrong field. renamed: our name of a field → the client's."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        location, message = first["loc"], first["msg"]
        if first["type"] == "extra_forbidden":  # its location ends with the client's own text
            location, message = location[:-1], "it has a field that isn't known here"
        raise _field_error(location, first["type"], message, renamed) from None


def _field_error(location: Sequence[int | str], kind: str, message: str, renamed: Mapping[str, str]) -> ApiError:
    param = ""
    for part in location:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    param = renamed.get(param, param)
    if kind == "missing":
        return bad_request(f"{param} is missing", param, ErrorCode.MISSING_REQUIRED_PARAMETER)
    code = ErrorCode.INVALID_TYPE if kind.endswith("_type") else ErrorCode.INVALID_VALUE
    return bad_request(f"{param}: {message}"[:_MAX_MESSAGE], param or None, code)


@contextmanager
def renamed_errors(names: Mapping[str, str]) -> Iterator[None]:
    """Name fields in errors as the client did. names: our name → the client's. Positions inside a translated field are
    left out, as the client's body has others."""
    try:
        yield
    except ApiError as error:
        param = error.param or ""
        name = re.split(r"[.\[]", param, maxsplit=1)[0]
        if (theirs := names.get(name)) is None:
            raise
        text = error.message.replace(param, theirs)
        raise ApiError(error.status, error.code, text, param=theirs, retry_after=error.retry_after) from None


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry for a body that a route reads itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # `app` puts them under components
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
