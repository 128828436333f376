"""The page in Debian's Chromium, driven by Playwright. `make browser` runs these; `make test` leaves them out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.server.api_server import LiveServer, make_state

MISSING = "BROWSER TESTS SKIPPED: {} is not installed; `make browser` installs what they need where it can"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name.startswith("test_") and not config.getoption("--browser") else None


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    pytest.importorskip("playwright", reason=MISSING.format("Playwright"))
    from playwright.sync_api import sync_playwright

    from support.browser.program import find_browser
    from support.browser.visit import launch

    program = find_browser()
    if program is None:
        pytest.skip(MISSING.format("Chromium"))
    with sync_playwright() as playwright:
        opened = launch(playwright, program)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: object, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """`visit(server)`: a fresh tab that looks at a server. At the end nothing may have gone wrong in it."""
    from support.browser.visit import visiting

    with ExitStack() as stack:
        yield lambda url, **options: stack.enter_context(visiting(browser, getattr(url, "url", url), **options))


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveServer]:
    with LiveServer(make_state()) as live:
        yield live


@pytest.fixture
def server(shared: LiveServer) -> Iterator[LiveServer]:
    """A server over the engine without a model, which says what a test wants."""
    shared.script()
    yield shared
    shared.script()
    shared.assert_quiet()
