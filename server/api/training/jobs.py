"""OpenAI's fine-tuning jobs: create, list, get, cancel, events, checkpoints; and the deletion of a model of a job."""

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.body import body_schema, parse_object, read_body
from guanaco.server.api.generation.state import json_response, state_of
from guanaco.server.api.http.errors import bad_request, model_not_found
from guanaco.server.api.training.common import (
    asked_page,
    listed,
    owner_of,
    page,
    refusals,
    service_of,
    unknown_after,
)
from guanaco.server.api.training.protocol import JobBody, read_job

router = APIRouter(tags=["training"])

_MOST, _DEFAULT = 100, 20  # items on a page
_DEFAULT_CHECKPOINTS = 10
_PATH = "/v1/fine_tuning/jobs"


@router.post(_PATH, summary="Train an adapter on a file", openapi_extra=body_schema(JobBody))
async def create_job(request: Request) -> Response:
    service, state = service_of(request), state_of(request)
    with state.intake.body(request.scope["guanaco.key"]) as held:
        raw = await read_body(request, state.settings.max_body_bytes, held)
        body = read_job(await asyncio.to_thread(parse_object, raw))
    base = state.catalog.base.name
    if body.model != base:
        if not state.catalog.is_known(body.model, request.scope["guanaco.key"]):
            raise model_not_found()
        raise bad_request(f"model must be the base, {base}: a job starts from it, not from an adapter", "model")
    with refusals():
        return json_response((await service.create(owner_of(request), body.request())).public())


@router.get(_PATH, summary="The jobs of this API key, the latest first")
async def list_jobs(request: Request) -> Response:
    jobs = service_of(request).jobs.of(owner_of(request).digest)[::-1]
    items, has_more = page(request, jobs, most=_MOST, default=_DEFAULT)
    return json_response(listed(items, has_more, lambda job: job.public()))


@router.get(_PATH + "/{job_id}", summary="One job")
async def get_job(request: Request, job_id: str) -> Response:
    with refusals():
        return json_response(service_of(request).job(owner_of(request), job_id).public())


@router.post(_PATH + "/{job_id}/cancel", summary="End a job")
async def cancel_job(request: Request, job_id: str) -> Response:
    with refusals():
        return json_response((await service_of(request).cancel(owner_of(request), job_id)).public())


@router.get(_PATH + "/{job_id}/events", summary="What has happened in a job, the latest first")
async def list_events(request: Request, job_id: str) -> Response:
    after, limit = asked_page(request, most=_MOST, default=_DEFAULT)
    with refusals():
        try:
            events = await service_of(request).events(owner_of(request), job_id, after, limit + 1)
        except LookupError:
            raise unknown_after() from None
    return json_response(listed(events[:limit], len(events) > limit, lambda event: event))


@router.get(_PATH + "/{job_id}/checkpoints", summary="The checkpoints of a job, the latest first")
async def list_checkpoints(request: Request, job_id: str) -> Response:
    with refusals():
        found = service_of(request).job(owner_of(request), job_id).public_checkpoints()
    items, has_more = page(request, found, most=_MOST, default=_DEFAULT_CHECKPOINTS)
    return json_response(listed(items, has_more, lambda checkpoint: checkpoint))


@router.delete("/v1/models/{name}", summary="Remove a model that a job of this API key made")
async def delete_model(request: Request, name: str) -> Response:
    if request.scope.get("guanaco.key") is None:  # this server has no API keys, and the request has no admin key
        raise model_not_found()
    if not await service_of(request).delete_model(owner_of(request), name):
        raise model_not_found()
    return json_response({"id": name, "object": "model", "deleted": True})
