"""Two servers over one registry, and an operator's client of each."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from guanaco.server.adapters import sharing
from support.adapters.fleet import Fleet
from support.server.adapter_server import ADMIN


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, so that the tests need not wait."""
    monkeypatch.setattr(sharing, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sharing, "_RETRY_SECONDS", 0.1)


@pytest.fixture
def fleet(tmp_path: Path, quick: None) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    with made.one, made.two:
        yield made
        made.one.assert_quiet()
        made.two.assert_quiet()


@pytest.fixture
def one(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.one.client(headers=ADMIN) as client:
        yield client


@pytest.fixture
def two(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.two.client(headers=ADMIN) as client:
        yield client
