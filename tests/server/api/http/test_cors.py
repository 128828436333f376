"""Web pages of allowed origins may read the clients' routes, and no others; the browser's question needs no key."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from guanaco.server.api.app import create_app
from guanaco.server.api.http.auth import KeyRing, is_admin_path
from guanaco.server.api.http.cors import CORS_PATHS
from guanaco.server.commands.serve import check_origins
from guanaco.server.config import Settings, SettingsError, load_settings
from guanaco.server.errors import CommandError
from support.server.api_server import BASE, LiveServer, chat_body, make_state

PAGE, OTHER = "https://chat.example", "https://evil.example"
KEY = {"Authorization": "Bearer k"}
CHAT = "/v1/chat/completions"
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    state = make_state(keys=("k",), allow_origin=(PAGE, "http://localhost:3000"))
    with LiveServer(state) as server, server.client() as made:
        yield made


def preflight(
    client: httpx.Client, path: str, origin: str, headers: str = "authorization,content-type"
) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return client.options(path, headers={"Origin": origin, **asked})


def test_a_preflight_needs_no_key_and_an_answer_does(client: httpx.Client) -> None:
    stainless = "authorization,content-type,x-stainless-os,x-stainless-retry-count,x-split-key"
    answer = preflight(client, CHAT, PAGE, stainless)
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, PAGE)
    assert "Origin" in answer.headers["vary"]
    assert "access-control-allow-credentials" not in answer.headers
    done = client.post(CHAT, json=chat_body("x", max_tokens=1), headers={**KEY, "Origin": PAGE})
    assert (done.status_code, done.headers[ALLOWED]) == (200, PAGE)
    assert "X-Adapter-Version" in done.headers["access-control-expose-headers"]
    refused = client.post(CHAT, json=chat_body("x"), headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers[ALLOWED]) == (401, PAGE), "the page can read why"
    assert client.get(f"/v1/models/{BASE}", headers={**KEY, "Origin": PAGE}).headers[ALLOWED] == PAGE


@pytest.mark.parametrize("origin", [OTHER, PAGE + ".evil.example", PAGE + ":8443", "http://chat.example", "null", "*"])
def test_other_origins_get_nothing(client: httpx.Client, origin: str) -> None:
    answer = preflight(client, CHAT, origin)
    assert (answer.status_code, ALLOWED in answer.headers) == (400, False)
    done = client.get("/v1/models", headers={**KEY, "Origin": origin})
    assert (done.status_code, ALLOWED in done.headers) == (200, False)


def test_admin_files_and_jobs_routes_are_never_open_to_pages(client: httpx.Client) -> None:
    paths = set(create_app(make_state()).openapi()["paths"])
    open_below = ("/v1/models/", "/v1/responses/")
    closed = {path.replace("{name}", "a") for path in paths - CORS_PATHS if not path.startswith(open_below)}
    assert not any(is_admin_path(path) for path in CORS_PATHS)
    assert {"/v1/adapters/a", "/v1/aliases", "/v1/load_lora_adapter", "/metrics"} <= closed
    for path in {*closed, "/v1/files", "/v1/files/f", "/v1/fine_tuning/jobs", "/v1/batches", "/openapi.json"}:
        asked = preflight(client, path, PAGE)
        assert (asked.status_code, ALLOWED in asked.headers) == (401, False), path
        got = client.get(path, headers={**KEY, "Origin": PAGE})
        assert ALLOWED not in got.headers, path


def test_none_by_default() -> None:
    with LiveServer(make_state()) as server, server.client() as made:
        assert ALLOWED not in preflight(made, CHAT, PAGE).headers
        assert ALLOWED not in made.get("/v1/models", headers={"Origin": PAGE}).headers


def test_all_origins_where_there_are_no_keys(tmp_path: Path) -> None:
    with LiveServer(make_state(allow_origin=("*",))) as server, server.client() as made:
        assert made.get("/v1/models", headers={"Origin": OTHER}).headers[ALLOWED] == "*"
    settings = Settings(allow_origin=("*",))
    check_origins(settings, KeyRing())
    check_origins(Settings(allow_origin=(PAGE,)), KeyRing(["k"]))
    with pytest.raises(CommandError, match="--allow-origin"):
        check_origins(settings, KeyRing(["k"]))


@pytest.mark.parametrize(
    "text",
    ["chat.example", "https://chat.example/", "https://Chat.example", "https://a.example:443", "null", "https://*"],
)
def test_what_no_browser_sends_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--allow-origin: .*https://chat\.example"):
        load_settings({"allow_origin": (text,)})
    assert load_settings({"allow_origin": "tauri://localhost,http://[::1]:80 80".replace(" ", "")}).allow_origin
