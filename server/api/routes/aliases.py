"""Aliases while the server runs: point, split by weight, rename, roll back, remove. Behind the admin key (`auth`)."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from guanaco.adapters.errors import alias_not_found
from guanaco.server.adapters.aliases import AliasManager
from guanaco.server.api.generation.body import body_schema
from guanaco.server.api.generation.state import json_response
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.routes.admin import Name, admin_body, manager_of, refusal, refusals
from guanaco.server.api.values.base import Body

router = APIRouter(tags=["aliases"])

_MAX_SPLIT = 64  # the most entries that are read; the alias table has its own, lower limit


def _split(value: object) -> dict[str, int]:
    if not isinstance(value, dict) or len(value) > _MAX_SPLIT or not all(type(w) is int for w in value.values()):
        problem = "give an object of targets (NAME or NAME@VERSION) and weights, which are whole numbers"
        raise PydanticCustomError("value_error", problem)
    return value


class AliasBody(Body):
    """Exactly one of `target` and `split` must be given."""

    target: Annotated[str, Field(min_length=1, max_length=130)] | None = None
    split: (
        Annotated[
            dict[str, int],
            BeforeValidator(_split),
            WithJsonSchema({"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}),
        ]
        | None
    ) = None
    expected_revision: Annotated[int, Field(ge=0)] | None = None


class RenameBody(Body):
    name: Name


class RevisionBody(Body):
    revision: Annotated[int, Field(ge=1)] | None = None


def _card(aliases: AliasManager, name: str) -> dict[str, Any]:
    view = aliases.view(name)
    if view is None:
        raise refusal(alias_not_found())
    return {"object": "alias", **view.public()}


@router.get("/v1/aliases", summary="All aliases with their targets")
async def list_aliases(request: Request) -> Response:
    views = manager_of(request).aliases.views()
    return json_response({"object": "list", "data": [{"object": "alias", **view.public()} for view in views]})


@router.get("/v1/aliases/{name}", summary="One alias with its history")
async def get_alias(request: Request, name: str) -> Response:
    return json_response(_card(manager_of(request).aliases, name))


@router.put("/v1/aliases/{name}", summary="Point a name elsewhere, or split it", openapi_extra=body_schema(AliasBody))
async def put_alias(request: Request, name: str) -> Response:
    aliases, body = manager_of(request).aliases, await admin_body(request, AliasBody)
    if (body.target is None) == (body.split is None):
        raise bad_request("give either target, or split", "target")
    split = {body.target: 1} if body.split is None else body.split
    is_new = aliases.view(name) is None
    with refusals():
        await aliases.put(name, split, expected_revision=body.expected_revision)
    return json_response(_card(aliases, name), 201 if is_new else 200)


@router.delete("/v1/aliases/{name}", summary="Remove an alias; what it leads to stays")
async def delete_alias(request: Request, name: str) -> Response:
    with refusals():
        await manager_of(request).aliases.remove(name)
    return json_response({"object": "alias.deleted", "name": name, "deleted": True})


@router.post("/v1/aliases/{name}/rename", summary="Another name for it", openapi_extra=body_schema(RenameBody))
async def rename_alias(request: Request, name: str) -> Response:
    aliases, body = manager_of(request).aliases, await admin_body(request, RenameBody)
    with refusals():
        await aliases.rename(name, body.name)
    return json_response(_card(aliases, body.name))


@router.post(
    "/v1/aliases/{name}/rollback", summary="Back to an earlier revision", openapi_extra=body_schema(RevisionBody)
)
async def rollback_alias(request: Request, name: str) -> Response:
    aliases, body = manager_of(request).aliases, await admin_body(request, RevisionBody)
    with refusals():
        await aliases.rollback(name, body.revision)
    return json_response(_card(aliases, name))
