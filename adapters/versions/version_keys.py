"""The API keys that each version of a name was published for, so that a pinned earlier version stays restricted.

A name's profile says who may use the name now. An alias may lead to an earlier version with another restriction, which
the present profile no longer has. It is kept here, by name and version. Called by the registry and its records.
"""

from collections.abc import Container, Iterable
from typing import Any

Keys = tuple[str, ...]


class VersionKeys:
    """The restrictions of versions. A version without a record is open to everybody. Any thread may read."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, str], Keys] = {}

    def of(self, name: str, version: str) -> Keys | None:
        """The ids of the keys that a version was published for; None: open to everybody."""
        return self._keys.get((name, version))

    def note(self, name: str, version: str, keys: Keys | None) -> None:
        """Record that a version was published under a name for these keys; replaces an earlier record."""
        if keys is None:
            self._keys.pop((name, version), None)
        else:
            self._keys[name, version] = keys

    def restore(self, records: Iterable[tuple[str, str, Keys]]) -> None:
        """Bring back saved records; records that were made since the start take precedence."""
        for name, version, keys in records:
            self._keys.setdefault((name, version), keys)

    def records(self, wanted: Container[str]) -> list[dict[str, Any]]:
        """Plain data about the versions in `wanted`; the other records are forgotten."""
        self._keys = {at: keys for at, keys in self._keys.items() if at[1] in wanted}
        return [{"name": name, "version": version, "keys": list(keys)} for (name, version), keys in self._keys.items()]
