"""Shared parts of the admin routes: access to the adapter manager, reading bodies, refusals as HTTP errors.

Here the client is the operator, so it gets an AdapterError's code and message. docs/adapter-codes.md lists the codes.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from guanaco.adapters.errors import AdapterError, ErrorKind
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.api.generation.body import parse_object, read_body, validate
from guanaco.server.api.generation.state import state_of
from guanaco.server.api.http.errors import ApiError

Name = Annotated[str, Field(min_length=1, max_length=64)]

# The kind of an adapter manager's refusal → the HTTP status.
STATUS = {
    ErrorKind.CALLER: 400,
    ErrorKind.MISSING: 404,
    ErrorKind.FORBIDDEN: 403,
    ErrorKind.CONFLICT: 409,
    ErrorKind.CAPACITY: 507,
    ErrorKind.UPSTREAM: 502,
    ErrorKind.PASSING: 503,
    ErrorKind.STORAGE: 507,
    ErrorKind.OURS: 500,
}


def manager_of(request: Request) -> AdapterManager:
    """The adapter manager. Raises a 403 if adapters can't be changed while this server runs."""
    manager = state_of(request).adapters
    if manager is None:
        raise ApiError(403, ErrorCode.ADMIN_DISABLED, "adapters can't be changed while this server runs")
    return manager


async def admin_body(request: Request, model: type[Any]) -> Any:
    """Read the request's body and validate it as `model`."""
    state = state_of(request)
    with state.intake.body(request.scope.get("guanaco.key")) as held:
        raw = await read_body(request, state.settings.max_body_bytes, held)
        return validate(model, await asyncio.to_thread(parse_object, raw))


@contextmanager
def refusals() -> Iterator[None]:
    """Turn an AdapterError in the `with` block into an HTTP error. For admin routes only: its message may hold
    paths."""
    try:
        yield
    except AdapterError as error:
        raise refusal(error) from None


def refusal(error: AdapterError) -> ApiError:
    """The HTTP error for a refusal of the adapter manager."""
    return ApiError(STATUS[error.kind], error.code, str(error), param=error.field)
