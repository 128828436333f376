"""Models as OpenAI's reference has them: the list, one of them, and one that isn't there."""

import httpx
import pytest

from support.server import openai_shapes as shapes
from support.server.api_server import BASE, PIRATE, TERSE


def test_list(http: httpx.Client) -> None:
    answer = http.get("/v1/models")
    page = answer.json()
    assert answer.headers["x-request-id"]
    assert page["object"] == "list"
    assert [shapes.model(card)["id"] for card in page["data"]] == [BASE, PIRATE, TERSE]


@pytest.mark.parametrize("name", [BASE, PIRATE, TERSE, BASE.replace("/", "%2F")])
def test_retrieve(http: httpx.Client, name: str) -> None:
    """A name with a slash is found either way: OpenAI's client escapes it, curl's users don't."""
    answer = http.get(f"/v1/models/{name}")
    assert answer.status_code == 200
    assert shapes.model(answer.json())["id"] == name.replace("%2F", "/")


@pytest.mark.parametrize("name", ["gpt-4o", "x" * 300, "..", "%00", "%F0%9F%A6%99", "a/b/c"])
def test_no_such_model(http: httpx.Client, name: str) -> None:
    answer = http.get(f"/v1/models/{name}")
    error = shapes.error(answer.json())
    assert (answer.status_code, error["type"]) == (404, "invalid_request_error")
    if name != "..":  # the client itself goes up with it
        assert (error["param"], error["code"]) == ("model", "model_not_found")
