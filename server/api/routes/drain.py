"""POST /v1/drain: an orderly end of the server over HTTP, as by SIGTERM. Behind the admin key (`auth`)."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.state import json_response, state_of

router = APIRouter(tags=["adapters"])


@router.post("/v1/drain", summary="End the server as SIGTERM does: running requests may finish")
async def drain(request: Request) -> Response:
    """Answers at once; the process ends when its requests have, at the latest after the two settings' seconds."""
    state = state_of(request)
    state.lifecycle.draining = state.lifecycle.end_wanted = True
    seconds = state.settings.drain_delay + state.settings.drain_timeout
    return json_response({"object": "drain", "status": "draining", "seconds_at_most": seconds}, 202)
