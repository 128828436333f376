"""OpenAI's routes that this server doesn't have say so, whatever the method and whatever follows in the path."""

import re
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from guanaco.server.api.http.error_paths import NOT_SERVED, SERVED, not_served
from support.server.api_server import LiveServer, make_state


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


@pytest.mark.parametrize("family", NOT_SERVED)
def test_each_is_refused_by_name(server: LiveServer, family: str) -> None:
    with server.client() as client:
        for method, path in (("POST", f"/v1/{family}"), ("GET", f"/v1/{family}/x/y"), ("DELETE", f"/{family}/x")):
            response = client.request(method, path)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (404, "route_not_served")
            assert error["message"].startswith(NOT_SERVED[family])
            assert "/v1/chat/completions" in error["message"]


@pytest.mark.parametrize("path", ["/v1", "/", "/v1/nope", "/v1/embeddingsx", "/x/embeddings", "/v1/models/a/b"])
def test_other_paths_are_no_such_route(path: str) -> None:
    assert not_served(path) is None


def test_none_of_them_is_served(server: LiveServer) -> None:
    paths = server.server.config.app.openapi()["paths"]
    assert {not_served(path) for path in paths} == {None}
    named = re.findall(r"/[\w/]+", SERVED)
    assert len(named) >= 5
    assert set(named) <= paths.keys(), "what the message names instead is there"


def test_the_client_does_not_try_again(server: LiveServer) -> None:
    with (
        OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.NotFoundError, match="embeddings are not served here"),
    ):
        client.embeddings.create(model="x", input="y")
