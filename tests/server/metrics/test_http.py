"""HTTP requests by route and status: what is counted, and that no client makes a series of its own."""

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry

from guanaco.server.metrics.limits import publish_limits
from support.server.api_server import PIRATE, LiveServer, chat_body, make_state


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def counted(server: LiveServer) -> dict[tuple[str, str, str], float]:
    (family,) = [f for f in server.state.metrics.registry.collect() if f.name == "http_requests"]
    return {
        (sample.labels["method"], sample.labels["handler"], sample.labels["status"]): sample.value
        for sample in family.samples
    }


def test_by_route_and_class_of_status(server: LiveServer, client: httpx.Client) -> None:
    for model in (PIRATE, PIRATE, "nobody"):
        client.post("/v1/chat/completions", json={**chat_body("hello"), "model": model})
    client.get(f"/v1/models/{PIRATE}")
    server.assert_quiet()
    route = "/v1/chat/completions"
    models = [key for key in counted(server) if key[1].startswith("/v1/models/")]
    assert [(method, status) for method, _, status in models] == [("GET", "2xx")]
    assert PIRATE not in models[0][1], "the route's pattern, not the client's path"
    assert (counted(server)["POST", route, "2xx"], counted(server)["POST", route, "4xx"]) == (2, 1)
    seconds = server.state.metrics.registry.get_sample_value
    labels = {"handler": route, "method": "POST"}
    assert seconds("http_request_duration_seconds_count", labels) == 3


def test_probes_and_scrapes_are_not_counted(server: LiveServer, client: httpx.Client) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        client.get(path)
    server.assert_quiet()
    assert counted(server) == {}


def test_paths_and_methods_of_clients_make_no_series(server: LiveServer, client: httpx.Client) -> None:
    for number in range(20):
        client.get(f"/nothing/{number}")
        server.state.metrics.http.observe(None, f"METHOD{number}", 404, 0.1)
    server.assert_quiet()
    methods, handlers, statuses = map(set, zip(*counted(server), strict=True))
    assert (methods, statuses) == ({"GET", "other"}, {"4xx"})
    assert handlers == {"none"}


def test_limits_are_read_at_every_scrape() -> None:
    registry, left = CollectorRegistry(), [900]
    publish_limits(registry, max_queued_requests=7, memory=lambda: (1000, left[0]))
    left[0] = 50
    names = ("max_queued_requests", "memory_limit_bytes", "memory_available_bytes")
    assert [registry.get_sample_value(f"guanaco_{name}") for name in names] == [7, 1000, 50]
