"""Completes FastAPI's document. FastAPI knows only the paths, since the routes read and write bytes themselves."""

from typing import Any

from guanaco.server.api.document.answers import ANSWER_OF, ANSWERS, STREAMS
from guanaco.server.api.document.examples import EXAMPLES
from guanaco.server.api.document.training import TRAINING_ANSWER_OF, TRAINING_ANSWERS, TRAINING_EXAMPLES
from guanaco.server.api.http.auth import OPEN_PATHS, TRAINING_PATHS, is_admin_path
from guanaco.server.api.http.error_paths import is_anthropic

_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
_KEYS: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
_HEADERS = {
    "X-Request-Id": {"schema": {"type": "string"}, "description": "stands in the server's log as well"},
    "X-Ignored-Fields": {"schema": {"type": "string"}, "description": "fields of the body that mean nothing here"},
}


_ANSWER_OF = {**ANSWER_OF, **TRAINING_ANSWER_OF}
_EXAMPLES = {**EXAMPLES, **TRAINING_EXAMPLES}


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_JOB_PAGE = [
    _query("limit", "items on a page", type="integer", minimum=1, maximum=100),
    _query("after", "the id of the item before the page", type="string"),
]
_PARAMETERS = {
    "/v1/files": [
        _query("limit", "files on a page", type="integer", minimum=1, maximum=10_000, default=10_000),
        _query("order", "desc: the latest first", type="string", enum=["asc", "desc"], default="desc"),
        _query("after", "the id of the file before the page", type="string"),
        _query("purpose", "files of this purpose alone", type="string"),
    ],
    "/v1/fine_tuning/jobs": _JOB_PAGE,
    "/v1/fine_tuning/jobs/{job_id}/events": _JOB_PAGE,
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": _JOB_PAGE,
    "/v1/responses/{response_id}/input_items": [
        _query("limit", "items on a page", type="integer", minimum=1, maximum=100, default=20),
        _query("order", "desc: the latest first", type="string", enum=["asc", "desc"], default="desc"),
        _query("after", "the id of the item before the page", type="string"),
    ],
}


def describe(document: dict[str, Any], *, has_keys: bool) -> None:
    """Complete the document in place. has_keys: whether a client of this server needs a key."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # no route answers with FastAPI's own errors
        schemas.pop(name, None)
    schemas.update(ANSWERS)
    if not document["paths"].keys().isdisjoint(TRAINING_PATHS):
        schemas.update(TRAINING_ANSWERS)
    components["securitySchemes"] = _SECURITY
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            _describe_route(method, path.replace("{name:path}", "{name}"), route, has_keys=has_keys)


def _describe_route(method: str, path: str, route: dict[str, Any], *, has_keys: bool) -> None:
    if path in OPEN_PATHS:
        route["security"] = []
    elif has_keys or is_admin_path(path) or (method, path) in TRAINING_ANSWER_OF:
        route["security"] = _KEYS
    else:
        route["security"] = [{}, *_KEYS]
    if path in _EXAMPLES and method == "post":
        route["requestBody"]["content"]["application/json"]["example"] = _EXAMPLES[path]
    if method == "get":
        route.setdefault("parameters", []).extend(_PARAMETERS.get(path, []))
    responses = route["responses"]
    responses.pop("422", None)
    if (method, path) in _ANSWER_OF:
        responses["200"] = _success(path, _ANSWER_OF[method, path])
        if path in OPEN_PATHS:
            responses["503"] = {**responses["200"], "description": "not now"}
    error = {"$ref": f"#/components/schemas/{'MessagesError' if is_anthropic(path) else 'Error'}"}
    for status, description in (("4XX", "the request is at fault"), ("5XX", "the server is at fault, or is busy")):
        responses[status] = {"description": description, "content": {"application/json": {"schema": error}}}


def _success(path: str, answer: str | None) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "the answer", "headers": _HEADERS}
    if answer is not None:
        success["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}
    elif path.endswith("/content"):
        success["content"] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    elif path == "/metrics":
        success["content"] = {"text/plain": {"schema": {"type": "string"}}}
    if path in STREAMS:
        events = {"schema": {"type": "string", "description": STREAMS[path]}}
        success["content"]["text/event-stream"] = events
        success["description"] = "the answer; with `stream: true` as events"
    return success
