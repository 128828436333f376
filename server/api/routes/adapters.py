"""Adapters while the server runs: list, load, replace, roll back, check, remove; and vLLM's two routes.

Behind the admin key (`auth`). Turns requests into calls of the adapter manager, and its refusals into HTTP errors. Here
the client is the operator, so it gets the AdapterError's code and message.
"""

import re
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from guanaco.adapters.errors import AdapterError, adapter_not_found
from guanaco.models.error_codes import ErrorCode
from guanaco.server.adapters.manager import AdapterManager
from guanaco.server.adapters.sources import LoadRequest
from guanaco.server.adapters.view import AdapterView
from guanaco.server.api.generation.body import body_schema
from guanaco.server.api.generation.state import json_response
from guanaco.server.api.http.access_log import record_of
from guanaco.server.api.http.errors import ApiError, bad_request
from guanaco.server.api.routes.admin import Name, admin_body, manager_of, refusal, refusals
from guanaco.server.api.values.base import Body

router = APIRouter(tags=["adapters"])

_MAX_TIMEOUT_SECONDS = 300.0
_DEFAULT_TIMEOUT_SECONDS = 10.0
_VLLM_FIELDS = {"name": "lora_name", "source": "lora_path", "path": "lora_path"}  # ours → vLLM's

_Source = Annotated[str, Field(min_length=1, max_length=1024)]


def _digits_of_a_version(text: str) -> str:
    if re.fullmatch("[0-9a-f]{6,64}", text) is None:
        problem = "a version is written as 6 to 64 of its hexadecimal digits; the adapter's card has them"
        raise PydanticCustomError("value_error", problem)
    return text


def _whole_version(text: str) -> str:
    if re.fullmatch("[0-9a-f]{64}", text) is None:
        problem = "the whole version is expected here, all 64 hexadecimal digits, as the adapter's card has it"
        raise PydanticCustomError("value_error", problem)
    return text


_Version = Annotated[str, AfterValidator(_digits_of_a_version)]


class LoadBody(Body):
    """vLLM's."""

    lora_name: Name
    lora_path: _Source
    load_inplace: bool = False


class UnloadBody(Body):
    """vLLM's."""

    lora_name: Name


class PutBody(Body):
    source: _Source
    expected_version: Annotated[str, AfterValidator(_whole_version)] | None = None
    # Instead of the guanaco.json beside the adapter; a text is the name of a built-in one.
    profile: dict[str, Any] | Annotated[str, Field(max_length=64)] | None = None


class CheckBody(Body):
    source: _Source


class PinBody(Body):
    pinned: bool


class RollbackBody(Body):
    version: _Version | None = None


def _card(view: AdapterView) -> dict[str, Any]:
    return {"object": "adapter", **view.public()}


def _view(manager: AdapterManager, name: str) -> AdapterView:
    view = manager.view(name)
    if view is None:
        raise refusal(adapter_not_found())
    return view


def _vllm_refusal(error: AdapterError, is_there: bool = False) -> ApiError:
    """As `refusal`, with the field names of vLLM's routes, and with vLLM's status for a name that is taken or
    unknown."""
    known = refusal(error)
    param = _VLLM_FIELDS.get(error.field or "", error.field)
    if error.code != ErrorCode.NAME_TAKEN:
        return ApiError(known.status, known.code, known.message, param=param)
    hint = "; to replace it, set load_inplace to true" if is_there else ""
    return ApiError(400, ErrorCode.NAME_TAKEN, f"{error}{hint}", param=param)


@router.post("/v1/load_lora_adapter", summary="vLLM's: load an adapter", openapi_extra=body_schema(LoadBody))
async def load_lora_adapter(request: Request) -> Response:
    manager, body = manager_of(request), await admin_body(request, LoadBody)
    record_of(request.scope).model = body.lora_name
    try:
        try:
            await manager.load(LoadRequest(body.lora_name, body.lora_path, replace=body.load_inplace))
        except AdapterError as error:
            # Controllers repeat a load if they missed the answer, and accept only a 200 as success.
            is_there = error.code == ErrorCode.NAME_TAKEN and manager.view(body.lora_name) is not None
            if not is_there or not await manager.is_same(body.lora_name, body.lora_path):
                raise
    except AdapterError as error:
        raise _vllm_refusal(error, manager.view(body.lora_name) is not None) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", summary="vLLM's: remove an adapter", openapi_extra=body_schema(UnloadBody))
async def unload_lora_adapter(request: Request) -> Response:
    manager, body = manager_of(request), await admin_body(request, UnloadBody)
    try:
        await manager.unload(body.lora_name)
    except AdapterError as error:
        raise _vllm_refusal(error) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/adapters", summary="All adapters with their state")
async def list_adapters(request: Request) -> Response:
    manager = manager_of(request)
    answer: dict[str, Any] = {"object": "list", "data": [_card(view) for view in manager.views()]}
    if (registry := manager.sharing.public()) is not None:
        answer["registry"] = registry
    return json_response(answer)


@router.get("/v1/adapters/{name}", summary="One adapter")
async def get_adapter(request: Request, name: str) -> Response:
    return json_response(_card(_view(manager_of(request), name)))


@router.put("/v1/adapters/{name}", summary="Load or replace an adapter", openapi_extra=body_schema(PutBody))
async def put_adapter(request: Request, name: str) -> Response:
    manager, body = manager_of(request), await admin_body(request, PutBody)
    is_new = manager.view(name) is None
    profile = {"profile": body.profile} if isinstance(body.profile, str) else body.profile
    with refusals():
        await manager.load(LoadRequest(name, body.source, True, body.expected_version, profile))
    return json_response(_card(_view(manager, name)), 201 if is_new else 200)


@router.delete(
    "/v1/adapters/{name}", summary="Remove an adapter: ?timeout=SECONDS to wait, ?force=true to end requests"
)
async def delete_adapter(request: Request, name: str) -> Response:
    manager, query = manager_of(request), request.query_params
    if unknown := set(query) - {"force", "timeout"}:
        raise bad_request("only force and timeout may be given", sorted(unknown)[0])
    force = query.get("force", "false")
    if force not in ("true", "false"):
        raise bad_request("force must be true or false", "force")
    timeout = query.get("timeout", str(_DEFAULT_TIMEOUT_SECONDS))
    if re.fullmatch(r"\d{1,3}(\.\d{1,3})?", timeout) is None or float(timeout) > _MAX_TIMEOUT_SECONDS:
        raise bad_request(f"timeout must be a number of seconds up to {_MAX_TIMEOUT_SECONDS:.0f}", "timeout")
    with refusals():
        drained = await manager.unload(name, force=force == "true", timeout_seconds=float(timeout))
    return json_response({"object": "adapter.deleted", "name": name, "deleted": True, "drained": drained})


@router.post("/v1/adapters/{name}/check", summary="Would it load, and fit?", openapi_extra=body_schema(CheckBody))
async def check_adapter(request: Request, name: str) -> Response:
    manager, body = manager_of(request), await admin_body(request, CheckBody)
    with refusals():
        report = await manager.check(name, body.source)
    return json_response({"object": "adapter.check", "name": name, **report})


@router.post(
    "/v1/adapters/{name}/rollback", summary="Back to an earlier version", openapi_extra=body_schema(RollbackBody)
)
async def rollback_adapter(request: Request, name: str) -> Response:
    manager, body = manager_of(request), await admin_body(request, RollbackBody)
    with refusals():
        await manager.rollback(name, body.version)
    return json_response(_card(_view(manager, name)))


@router.post(
    "/v1/adapters/{name}/pin", summary="Keep it in the host's memory, or no longer", openapi_extra=body_schema(PinBody)
)
async def pin_adapter(request: Request, name: str) -> Response:
    manager, body = manager_of(request), await admin_body(request, PinBody)
    with refusals():
        await manager.pin(name, pinned=body.pinned)
    return json_response(_card(_view(manager, name)))
