"""What the admin routes share: the adapter manager, bodies, and its refusals in the envelope.

Doesn't know the routes. An AdapterError's code is the client's, and its message is for the operator, who is the client
here; docs/adapters.md lists the codes.
"""

import asyncio
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from guanaco.server.adapters.manager import AdapterManager, AdapterRefused
from guanaco.server.api.generation.body import parse_object, read_body, validate
from guanaco.server.api.generation.state import state_of
from guanaco.server.api.http.errors import ApiError

Name = Annotated[str, Field(min_length=1, max_length=64)]

# Of a refusal's code; all others are a 400.
STATUS = {
    "adapter_not_found": 404,
    "not_found": 404,
    "version_missing": 404,
    "alias_not_found": 404,
    "target_not_found": 404,
    "revision_missing": 404,
    "changed_while_reading": 409,
    "alias_cycle": 409,
    "too_many_aliases": 409,
    "revision_conflict": 409,
    "hub_forbidden": 403,
    "hub_not_found": 404,
    "hub_failed": 502,
    "hub_offline": 503,
    "name_taken": 409,
    "no_history": 409,
    "version_conflict": 409,
    "host_memory_full": 507,
    "device_memory_full": 507,
    "store_failed": 507,
    "version_damaged": 500,
    "probe_failed": 503,
}


def manager_of(request: Request) -> AdapterManager:
    """What changes adapters; a 403 where nothing does."""
    manager = state_of(request).adapters
    if manager is None:
        raise ApiError(403, "admin_disabled", "adapters can't be changed while this server runs")
    return manager


async def admin_body(request: Request, model: type[Any]) -> Any:
    """The request's body as `model`."""
    state = state_of(request)
    with state.intake.body(request.scope.get("guanaco.key")) as held:
        raw = await read_body(request, state.settings.max_body_bytes, held)
        return validate(model, await asyncio.to_thread(parse_object, raw))


def refusal(error: AdapterRefused) -> ApiError:
    """A refusal as the client gets it."""
    return ApiError(STATUS.get(error.code, 400), error.code, str(error), param=error.field)
