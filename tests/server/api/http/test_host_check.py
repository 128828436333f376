"""A web page that has rebound its name to this machine gets nothing from a server without keys; `Host` is one."""

import json
from collections.abc import Iterator

import pytest

from guanaco.server.config import SettingsError, load_settings
from support.server.api_server import LiveServer, make_state


@pytest.fixture(scope="module")
def keyless() -> Iterator[LiveServer]:
    with LiveServer(make_state(allowed_host=("guanaco", "Lab.Example.org"))) as live:
        yield live


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=("secret",))) as live:
        yield live


def ask(server: LiveServer, host_lines: str, path: str = "/version", version: str = "1.1") -> tuple[int, str]:
    """Status and error code of one request."""
    lines = f"GET {path} HTTP/{version}\r\n{host_lines}Authorization: Bearer secret\r\nConnection: close\r\n\r\n"
    head, body = server.raw(lines.encode("latin-1")).split(b"\r\n\r\n", 1)
    status = int(head.split()[1])
    return status, json.loads(body)["error"]["code"] if status >= 400 else ""


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "192.168.7.9:8000", "[::1]", "[fe80::1]:8000"),
        *("guanaco", "guanaco:8000", "lab.example.org", "LAB.example.org.:80"),
    ],
)
def test_names_that_pass_without_a_key(keyless: LiveServer, host: str) -> None:
    assert ask(keyless, f"Host: {host}\r\n") == (200, "")


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notguanaco"),
        *("guanaco.evil", "localhost@evil", "evil/localhost", "[evil]", "[::1", "127.0.0.1 evil", "\xe9vil", "a,b"),
    ],
)
@pytest.mark.parametrize("path", ["/version", "/v1/models", "/health", "/v1/adapters"])
def test_other_names_are_refused_without_a_key(keyless: LiveServer, host: str, path: str) -> None:
    assert ask(keyless, f"Host: {host}\r\n", path) == (403, "host_not_allowed")


def test_the_refusal_says_what_to_do_and_quotes_nothing(keyless: LiveServer) -> None:
    answer = keyless.raw(b"GET /version HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert b"--allowed-host" in answer
    assert b"--api-key" in answer
    assert b"evil.example" not in answer


def test_any_name_passes_with_a_key(keyed: LiveServer) -> None:
    assert ask(keyed, "Host: evil.example\r\n") == (200, "")


@pytest.mark.parametrize("lines", ["", "Host:\r\n", "Host: localhost\r\nHost: localhost\r\n", "Host: t\r\nhOST: u\r\n"])
def test_none_or_two_are_malformed(keyless: LiveServer, keyed: LiveServer, lines: str) -> None:
    for server in (keyless, keyed):
        assert ask(server, lines) == (400, "malformed_request")


def test_http_1_0_needs_no_host(keyless: LiveServer) -> None:
    assert ask(keyless, "", version="1.0") == (200, "")
    assert ask(keyless, "Host: evil.example\r\n", version="1.0") == (403, "host_not_allowed")
    assert ask(keyless, "Host: t\r\nHost: t\r\n", version="1.0") == (400, "malformed_request")


@pytest.mark.parametrize("name", ["http://guanaco", "guanaco:8000", "*", "*.example.org", "a b", "guanaco/x"])
def test_what_is_no_name_stops_the_start(name: str) -> None:
    with pytest.raises(SettingsError, match=r"--allowed-host: .* is not a host name"):
        load_settings({"allowed_host": (name,)})


def test_names_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUANACO_ALLOWED_HOST", "guanaco, lab.example.org")
    assert load_settings({}).allowed_host == ("guanaco", "lab.example.org")
