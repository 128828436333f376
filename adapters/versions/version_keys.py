"""Which API keys each version of a name was published for, so that a pin to an earlier version opens nothing.

A name's profile says who may use the name now. An alias may lead to an earlier version, whose restriction the profile
no longer has; it is remembered here, by name and version. Called by the registry and its records.
"""

from collections.abc import Container, Iterable
from typing import Any

Keys = tuple[str, ...]


class VersionKeys:
    """The restrictions of versions; one without a record is for everybody. Any thread may read."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, str], Keys] = {}

    def of(self, name: str, version: str) -> Keys | None:
        """The ids of the keys that a version was published for; None: for everybody."""
        return self._keys.get((name, version))

    def note(self, name: str, version: str, keys: Keys | None) -> None:
        """A version is published under a name for these keys; what was said of it before no longer counts."""
        if keys is None:
            self._keys.pop((name, version), None)
        else:
            self._keys[name, version] = keys

    def restore(self, records: Iterable[tuple[str, str, Keys]]) -> None:
        """Put back what was written down; what was noted since the start goes before it."""
        for name, version, keys in records:
            self._keys.setdefault((name, version), keys)

    def records(self, wanted: Container[str]) -> list[dict[str, Any]]:
        """Plain data of the versions that may still be asked for; the others are forgotten."""
        self._keys = {at: keys for at, keys in self._keys.items() if at[1] in wanted}
        return [{"name": name, "version": version, "keys": list(keys)} for (name, version), keys in self._keys.items()]
