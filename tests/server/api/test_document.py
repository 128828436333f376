"""The OpenAPI document: complete for every route of clients, with examples that are sent and answers as it says."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from guanaco.server.api.app import create_app
from guanaco.server.api.document.answers import ANSWER_OF, STREAMS
from guanaco.server.api.document.examples import EXAMPLES
from guanaco.server.api.http.auth import OPEN_PATHS, is_admin_path
from support.server.api_server import LiveServer, make_state

DOCUMENT: dict[str, Any] = create_app(make_state()).openapi()
ROUTES = [
    (method, path, route)
    for path, methods in DOCUMENT["paths"].items()
    for method, route in methods.items()
    if not is_admin_path(path)
]
IDS = [f"{method} {path}" for method, path, _ in ROUTES]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with LiveServer(make_state()) as live, live.client() as client:
        yield client


def check(schema: dict[str, Any], value: object) -> None:
    """`value` is as a schema of the document says."""
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def answer_schema(method: str, path: str) -> dict[str, Any]:
    schema: dict[str, Any] = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]["application/json"][
        "schema"
    ]
    return schema


@pytest.mark.parametrize(("method", "path", "route"), ROUTES, ids=IDS)
def test_a_route_is_described(method: str, path: str, route: dict[str, Any]) -> None:
    assert (method, path.replace("{name:path}", "{name}")) in ANSWER_OF
    assert route["summary"]
    responses = route["responses"]
    assert {"200", "4XX", "5XX"} <= set(responses)
    assert "422" not in responses
    assert responses["200"]["description"] != "Successful Response"
    if path != "/health":
        assert responses["200"]["content"]
    kind = "MessagesError" if path.startswith("/v1/messages") else "Error"
    assert responses["4XX"]["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{kind}"}
    assert bool(route["security"]) == (path not in OPEN_PATHS)
    assert ("text/event-stream" in responses["200"].get("content", ())) == (path in STREAMS)
    if method == "post" and not path.endswith("/cancel"):
        content = route["requestBody"]["content"]["application/json"]
        assert content["schema"]["properties"]
        check(content["schema"], content["example"])


def test_every_entry_is_a_route() -> None:
    paths = {(method, path.replace("{name:path}", "{name}")) for method, path, _ in ROUTES}
    assert set(ANSWER_OF) == paths
    assert {("post", path) for path in EXAMPLES} | {("post", path) for path in STREAMS} <= paths


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_is_answered_as_described(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json=EXAMPLES[path])
    assert answer.status_code == 200, answer.text
    check(answer_schema("post", path), answer.json())


@pytest.mark.parametrize("path", STREAMS)
def test_an_example_can_be_streamed(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={**EXAMPLES[path], "stream": True})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")


PLAIN = [
    path for method, path, _ in ROUTES if method == "get" and "{" not in path and path not in ("/health", "/metrics")
]


@pytest.mark.parametrize("path", PLAIN)
def test_an_answer_is_as_described(http: httpx.Client, path: str) -> None:
    check(answer_schema("get", path), http.get(path).json())


def test_a_kept_response_is_as_described(http: httpx.Client) -> None:
    path = "/v1/responses/{response_id}"
    kept = http.post("/v1/responses", json=EXAMPLES["/v1/responses"]).json()["id"]
    for method, rest in (("get", ""), ("get", "/input_items"), ("post", "/cancel"), ("delete", "")):
        answer = http.request(method, f"/v1/responses/{kept}{rest}")
        assert answer.status_code == 200
        check(answer_schema(method, path + rest), answer.json())


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_error_is_as_described(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={"model": "no such model"})
    assert answer.status_code in (400, 404)
    check(DOCUMENT["paths"][path]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"], answer.json())


def test_keys_are_needed_where_there_are_some() -> None:
    document = create_app(make_state(keys=("sk-test",))).openapi()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey"}
    assert {} not in document["paths"]["/v1/models"]["get"]["security"]
    assert {} in DOCUMENT["paths"]["/v1/models"]["get"]["security"]
    assert {} not in DOCUMENT["paths"]["/v1/adapters"]["get"]["security"]
