"""Streams that fail or that a client leaves: an error event takes the place of a status, and of [DONE]."""

import json
from typing import Any

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, LiveServer

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": BASE, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": BASE, "prompt": "hi", "max_tokens": 50},
}


@pytest.mark.parametrize("failure", ["internal", "numerical_error", "engine_dead", "adapter_unloaded"])
@pytest.mark.parametrize("route", BODIES)
def test_a_stream_that_fails_ends_with_an_error(
    http: httpx.Client, server: LiveServer, route: str, failure: str
) -> None:
    server.script(fail_after=3, failure=failure)
    answer = http.post(route, json={**BODIES[route], "stream": True})
    assert answer.status_code == 200
    *chunks, last = shapes.sse_lines(answer.content)
    assert len(chunks) == 3
    assert shapes.error(json.loads(last))["type"] == "server_error"
    assert "[DONE]" not in chunks


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status"), [("internal", 500), ("queue_timeout", 503), ("engine_dead", 500)])
@pytest.mark.parametrize("route", BODIES)
def test_a_failure_before_the_first_token_is_a_status(
    http: httpx.Client, server: LiveServer, route: str, failure: str, status: int, stream: bool
) -> None:
    server.script(fail_after=0, failure=failure)
    answer = http.post(route, json={**BODIES[route], "stream": stream})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert shapes.error(answer.json())["type"] == "server_error"
    assert ("retry-after" in answer.headers) == (status == 503)


def test_a_response_that_fails_says_so_last(http: httpx.Client, server: LiveServer) -> None:
    server.script(fail_after=3)
    answer = http.post("/v1/responses", json={"model": BASE, "input": "hi", "stream": True})
    events = shapes.named_events(answer.content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert "response.completed" not in kinds
    assert kinds[-1] in ("response.failed", "error")
    (failed,) = [event["response"] for event in events if event["type"] == "response.failed"]
    assert failed["status"] == "failed"
    assert set(failed["error"]) == {"code", "message"}


@pytest.mark.parametrize("route", BODIES)
def test_a_client_that_leaves_ends_its_request(http: httpx.Client, server: LiveServer, route: str) -> None:
    server.script(step_seconds=0.01)
    before = len(server.engine.aborted)
    body = {**BODIES[route], "stream": True, "max_tokens": 100}
    with server.client() as client, client.stream("POST", route, json=body) as answer:
        next(answer.iter_raw())
    server.assert_quiet()
    assert len(server.engine.aborted) == before + 1


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("n", [1, 3])
def test_hidden_tokens_send_no_empty_chunks(http: httpx.Client, server: LiveServer, route: str, n: int) -> None:
    """A character of several tokens comes with the last of them."""
    server.script(hide_every=3)
    answer = http.post(route, json={**BODIES[route], "stream": True, "n": n, "max_tokens": 30})
    chunks = shapes.stream_of(answer.content)
    for chunk in chunks:
        for choice in chunk["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            assert text or choice["finish_reason"] or choice.get("delta", {}).get("role")
