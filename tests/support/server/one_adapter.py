"""One live adapter with a profile (in place of an `AdapterRegistry`), for tests of who may use it."""

from types import SimpleNamespace
from typing import Any


class OneAdapter:
    """Named `name`. profile: `allowed_keys` is what matters; the rest asks for nothing."""

    def __init__(self, name: str, profile: SimpleNamespace) -> None:
        whole = SimpleNamespace(chat_template=None, stop=(), sampling={}, **vars(profile))
        self.entry = SimpleNamespace(
            name=name, version="c" * 64, source="x", loaded_at=0.0, profile=whole, version_keys=None
        )

    def entries(self) -> list[Any]:
        return [self.entry]

    def resolve(self, name: str, version: str | None = None) -> Any:
        return self.entry if name == self.entry.name else None

    acquire = resolve

    def release(self, version: str) -> None: ...
