"""Two servers that share one registry, and what tests ask of them."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from guanaco.adapters.versions.shared_registry import SharedRegistry
from support.server.adapter_client import check_text, complete
from support.server.adapter_server import AdapterServer, make_adapter_server
from support.server.api_server import WAIT

KEY = "tenant-key"


class Fleet:
    """Two servers over one registry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shared = path / "shared"
        self.one, self.two = self.make("one"), self.make("two")

    def make(self, name: str, **options: Any) -> AdapterServer:
        return make_adapter_server(self.path / name, shared=self.shared, keys=(KEY,), **options)

    def listed(self) -> dict[str, str]:
        """Name → version, as the list has it."""
        content = json.loads((self.shared / "list.json").read_text())
        return {record["name"]: record["version"] for record in content["adapters"]}

    def profile(self, name: str) -> dict[str, Any] | None:
        """The profile that the list gives a name."""
        records = json.loads((self.shared / "list.json").read_text())["adapters"]
        return next(record["profile"] for record in records if record["name"] == name)

    def folder(self, version: str) -> Path:
        return self.shared / "versions" / version


def version_of(client: httpx.Client, name: str) -> str | None:
    """The version that makes a name's answers; None if there is no such name."""
    response = complete(client, model=name)
    if response.status_code == 404:
        return None
    return check_text(response, "hi", 8)


def until(holds: Callable[[], bool]) -> None:
    """Ask again until it is so."""
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.01)


def until_serves(client: httpx.Client, name: str, version: str | None) -> None:
    until(lambda: version_of(client, name) == version)


def state(client: httpx.Client) -> dict[str, Any]:
    registry: dict[str, Any] = client.get("/v1/adapters").json()["registry"]
    return registry


@contextmanager
def damaged_copies(damage: Callable[[Path], None] = shutil.rmtree) -> Iterator[None]:
    """Damage the copy of `a` before each list that names it: followers find the damage, and never a whole copy."""
    write = SharedRegistry.write

    def write_damaged(self: SharedRegistry, changed: Any) -> Any:
        damage(self.folder(changed.record("a").version))
        return write(self, changed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedRegistry, "write", write_damaged)
        yield
