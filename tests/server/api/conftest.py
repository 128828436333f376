"""The server that most tests of the API talk to: the whole HTTP side over an engine without a model.

A file that needs other settings has a `shared` of its own; a file that talks through OpenAI's or Anthropic's package
has a `client` of its own.
"""

from collections.abc import Iterator

import httpx
import pytest

from support.server.api_server import LiveServer, make_state


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveServer]:
    """One server for all tests of a file."""
    with LiveServer(make_state()) as live:
        yield live


@pytest.fixture
def server(shared: LiveServer) -> Iterator[LiveServer]:
    """The file's server, with the engine's usual behaviour; afterwards nothing may be left running or held."""
    shared.script()
    yield shared
    shared.assert_quiet()


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    """An HTTP client of `server`."""
    with server.client() as client:
        yield client
