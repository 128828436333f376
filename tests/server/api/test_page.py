"""The bundled page over HTTP: who gets it, with which headers, and that nothing else opens with it."""

import httpx
import pytest

from guanaco.server.page.files import read_page
from support.server.api_server import LiveServer, make_state

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PAGE = read_page()
DIRECTIVES = {
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types dompurify",
}  # fmt: skip


def test_a_browser_gets_the_page(client: httpx.Client) -> None:
    answer = client.get("/", headers=BROWSER)
    assert (answer.status_code, answer.content) == (200, PAGE["/"].body)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert set(answer.headers["content-security-policy"].split("; ")) == DIRECTIVES
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["vary"] == "Accept"
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "", "text/html;q=0", "text/html; q=0.0, */*", "text/plain"]
)
def test_others_get_at_the_root_what_they_got_before(client: httpx.Client, accept: str) -> None:
    answer = client.get("/", headers={"Accept": accept})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_every_file_is_there_by_get_and_head(client: httpx.Client) -> None:
    for path, file in PAGE.items():
        answer, head = client.get(path, headers=BROWSER), client.head(path, headers=BROWSER)
        assert (answer.status_code, answer.content) == (200, file.body), path
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(file.body)))
        assert answer.headers["content-security-policy"] == head.headers["content-security-policy"]
        assert answer.headers["content-type"] == head.headers["content-type"] == file.content_type


def test_a_file_that_the_browser_has_is_not_sent_again(client: httpx.Client) -> None:
    tag = client.get("/page/app/main.js").headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        answer = client.get("/page/app/main.js", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/app/main.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/nope.js",
        "/page/../config.py",
        "/page/%2e%2e/files.py",
        "/page/app",
        "/index.html",
        "/page/index.html",
    ],
)
def test_no_other_path_is_a_file(client: httpx.Client, path: str) -> None:
    assert client.get(path, headers=BROWSER).status_code == 404


def test_other_methods_are_not_the_pages(client: httpx.Client) -> None:
    assert client.post("/page/app/main.js").status_code == 404
    assert client.post("/", headers=BROWSER).status_code == 404


def test_with_keys_the_page_loads_without_one_and_nothing_else_does() -> None:
    with LiveServer(make_state(keys=("sesame",))) as server, server.client(headers=BROWSER) as client:
        for path in PAGE:
            assert client.get(path).status_code == 200, path
        for path in ("/page/nope.js", "/page/", "/v1/models", "/metrics", "/openapi.json", "/version", "/nope"):
            assert client.get(path).status_code == 401, path
        assert client.get("/", headers={"Accept": "application/json"}).status_code == 401
        assert client.post("/").status_code == 401


def test_without_the_page_nothing_is_there() -> None:
    with LiveServer(make_state(page=False)) as server, server.client(headers=BROWSER) as client:
        for path in ("/", "/page/app/main.js", "/page/icon.svg"):
            assert client.get(path).status_code == 404, path


def test_a_page_of_another_name_gets_nothing() -> None:
    """DNS rebinding: the page is behind the check of the Host header."""
    with LiveServer(make_state()) as server, server.client(headers=BROWSER) as client:
        answer = client.get("/", headers={"Host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
