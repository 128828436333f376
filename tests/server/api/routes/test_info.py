"""Models, health, version, metrics and the OpenAPI document over HTTP."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from support.server.api_server import BASE, MAX_MODEL_LEN, PIRATE, TERSE, LiveServer, make_state


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


def test_models(server: LiveServer) -> None:
    with server.client() as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == [BASE, PIRATE, TERSE], "the base comes first"
        assert listed["data"][0] == {
            "id": BASE,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "guanaco",
            "root": BASE,
            "parent": None,
            "max_model_len": MAX_MODEL_LEN,
            "permission": [],
            "base_fingerprint": "",
            "version": None,
            "sampling_defaults": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
            },
        }
        for card in listed["data"]:
            assert "name" not in card, "Open WebUI shows a null name instead of the id"
            assert client.get(f"/v1/models/{card['id']}").json() == card, "ids may hold slashes"
        for card in listed["data"][1:]:
            assert (card["parent"], card["root"]) == (BASE, card["id"])
            assert isinstance(card["created"], int)


@pytest.mark.parametrize("name", ["nope", "org", "org/base-model/", "../pirate", "PIRATE", "pirate%00", "%2e%2e/x"])
def test_unknown_models(server: LiveServer, name: str) -> None:
    with server.client() as client:
        response = client.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] in ("model_not_found", "not_found")
        for path, rest in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/completions", {"prompt": "x"}),
        ):
            response = client.post(path, json={"model": name, **rest})
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert server.engine.requests == [], "an unknown name is never the base model"


def test_health(server: LiveServer) -> None:
    with server.client() as client:
        for path in ("/health", "/health/live", "/health/ready"):
            assert client.get(path).status_code == 200
            assert client.head(path).status_code == 200
        assert client.get("/health").content == b""
        server.state.lifecycle.draining = True
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/ready").json() == {"status": "draining"}
        assert client.get("/health").status_code == 503


def test_readiness_says_what_computes() -> None:
    state = replace(make_state(), runs_on={"provider": "triton", "device": "NVIDIA L4, sm_89"})
    with LiveServer(state) as live, live.client() as client:
        told = client.get("/health/ready").json()
        assert told == {"status": "ready", "provider": "triton", "device": "NVIDIA L4, sm_89"}
        assert client.get("/health/live").json() == {"status": "live"}


def test_health_of_a_dead_engine(server: LiveServer) -> None:
    with server.client() as client:
        server.call(server.engine.die)
        for path in ("/health", "/health/live", "/health/ready"):
            assert client.get(path).status_code == 503


def test_version_and_metrics(server: LiveServer) -> None:
    with server.client() as client:
        assert client.get("/version").json() == {"version": "1.2.3"}
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        assert 'vllm:num_requests_running{engine="0",model_name="org/base-model"} 0.0' in response.text
        response = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")


def test_openapi_document_is_complete(server: LiveServer) -> None:
    with server.client() as client:
        document = client.get("/openapi.json").json()
        assert client.get("/docs").status_code == 404, "its page would load a script from the net"
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} <= set(schema["required"])

    def references(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            yield from [part["$ref"]] if "$ref" in part else []
            for value in part.values():
                yield from references(value)
        elif isinstance(part, list):
            for value in part:
                yield from references(value)

    found = set(references(document))
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_request_ids(server: LiveServer) -> None:
    with server.client() as client:
        for given in ("abc-123", "A" * 128, "trace:1/2@x"):
            assert client.get("/version", headers={"X-Request-Id": given}).headers["x-request-id"] == given
        seen = set()
        for given in ("", "A" * 129, "a b", "-x", "é", '"', "a\tb", "<script>"):
            answer = client.get("/nope", headers={"X-Request-Id": given.encode()}).headers["x-request-id"]
            assert answer.isalnum()
            assert len(answer) == 32
            seen.add(answer)
        assert len(seen) == 8


def test_no_cross_origin_permission(server: LiveServer) -> None:
    with server.client() as client:
        headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        for response in (
            client.get("/v1/models", headers=headers),
            client.options("/v1/chat/completions", headers=headers),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]


def test_other_routes_and_methods_get_the_envelope(server: LiveServer) -> None:
    with server.client() as client:
        for method, path, status in (
            ("GET", "/", 404),
            ("GET", "/v1/chat/completions/", 404),
            ("GET", "/v1/chat/completions", 405),
            ("DELETE", "/v1/models", 405),
            ("OPTIONS", "/v1/models", 405),
            ("POST", "/v1/embeddings", 404),
            ("POST", "/health", 405),
        ):
            response = client.request(method, path)
            assert response.status_code == status, path
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert client.get("/v1/chat/completions").headers["allow"] == "POST"
