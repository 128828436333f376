"""One server over the fake engine for all checks of this folder, and one client."""

from collections.abc import Iterator

import httpx
import pytest

from support.server.api_server import LiveServer, make_state


@pytest.fixture(scope="package")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


@pytest.fixture(scope="package")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(autouse=True)
def _plain_script(server: LiveServer) -> None:
    server.script()
