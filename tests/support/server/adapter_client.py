"""An operator and a client of an adapter server: short calls, and the check that an answer was made by who it names."""

from typing import Any

import httpx

from support.server.api_server import BASE
from support.server.engine_server import text_of
from support.server.fake_engine import BOS

COMPLETIONS = "/v1/completions"


def put(client: httpx.Client, name: str, source: str, **fields: Any) -> Any:
    response = client.put(f"/v1/adapters/{name}", json={"source": source, **fields})
    assert response.status_code in (200, 201), response.text
    return response.json()


def complete(client: httpx.Client, prompt: str = "hi", max_tokens: int = 8, **fields: Any) -> httpx.Response:
    return client.post(COMPLETIONS, json={"model": BASE, "prompt": prompt, "max_tokens": max_tokens, **fields})


def check_text(response: httpx.Response, prompt: str, max_tokens: int) -> str:
    """The version that made the answer: the one in its header, and every token says so."""
    assert response.status_code == 200, response.text
    version = response.headers.get("x-adapter-version", "")
    assert response.json()["choices"][0]["text"] == text_of((BOS, *prompt.encode()), version, max_tokens)
    return version


def error_code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def names(client: httpx.Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]
