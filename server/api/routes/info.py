"""Information about this server: models, health, metrics, version. All are cheap; none of them uses the model."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from guanaco.server.api.generation.encode import encode
from guanaco.server.api.generation.state import encoded_response, json_response, state_of
from guanaco.server.api.http.auth import ApiKey, presented_key

router = APIRouter()


def _key(request: Request) -> ApiKey | None:
    return request.scope.get("guanaco.key")


@router.get("/v1/models", tags=["models"], summary="The base model and its adapters")
async def list_models(request: Request) -> Response:
    state, key = state_of(request), _key(request)

    def cards() -> bytes:
        return encode({"object": "list", "data": [state.card_of(model) for model in state.catalog.all(key)]})

    return encoded_response(await state.answer_work.run(state.lane(key), cards))  # there may be thousands


@router.get("/lora-adapters", tags=["models"], summary="The adapters by number, as llama.cpp's clients name them")
async def lora_adapters(request: Request) -> Response:
    """The field `path` has the served name, never a path. No adapter applies by default, so each scale is 0."""
    state, key = state_of(request), _key(request)

    def entries() -> bytes:
        numbered = state.catalog.numbered_adapters(key)
        return encode([{"id": number, "path": name, "scale": 0.0} for number, name in numbered.items()])

    return encoded_response(await state.answer_work.run(state.lane(key), entries))


@router.get("/v1/models/{name:path}", tags=["models"], summary="One model by its name, slashes included")
async def get_model(request: Request, name: str) -> Response:
    state = state_of(request)
    return json_response(state.card_of(state.catalog.get(name, _key(request))))


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", tags=["health"], summary="200 while the process works")
async def live(request: Request) -> Response:
    health = state_of(request).engine.health()
    return json_response({"status": "live" if health.live else "dead"}, 200 if health.live else 503)


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", tags=["health"], summary="200 while new work is welcome")
async def ready(request: Request) -> Response:
    if problem := _not_ready(request):
        return json_response({"status": problem}, 503)
    state = state_of(request)
    registry = None if state.adapters is None else state.adapters.sharing.state
    follows = {} if registry is None else {"adapter_registry": registry}
    return json_response({"status": "ready", **state.runs_on, **follows})


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["health"], summary="As /health/ready, with an empty body")
async def health(request: Request) -> Response:
    return Response(status_code=503 if _not_ready(request) else 200)


def _not_ready(request: Request) -> str | None:
    state = state_of(request)
    if state.lifecycle.draining:
        return "draining"
    health = state.engine.health()
    return None if health.live and health.ready else "unavailable"


@router.get("/metrics", tags=["health"], summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    state, presented = state_of(request), presented_key(request.scope["headers"])
    is_admin = presented is not None and state.admin_keys.find(presented) is not None
    hidden = frozenset[str]() if is_admin else state.catalog.hidden_adapters(_key(request))
    body, content_type = state.metrics.render(request.headers.get("accept", ""), hidden)
    return Response(body, headers={"Content-Type": content_type})


@router.get("/version", tags=["health"], summary="The version of this server")
async def version(request: Request) -> Response:
    return json_response({"version": state_of(request).version})
