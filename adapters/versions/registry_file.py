"""The file with the adapters and aliases that a restart brings back: small JSON, written whole or not at all.

Knows no tensors; the store has the versions that it names. Called by the adapter manager.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.aliases import MAX_ALIASES, Alias, Revision, Target
from guanaco.adapters.versions.names import NAME
from guanaco.adapters.versions.profile import FROM_FILE, GIVEN, KEPT
from guanaco.adapters.versions.store import sync_directory
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.strict_json import JsonError, parse_object

T = TypeVar("T")
P = TypeVar("P")

_FORMAT = 1
_VERSION = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Saved:
    """One name's record in the file."""

    name: str
    version: str
    source: str
    history: tuple[str, ...] = ()
    effect: float | None = None
    profile: dict[str, Any] | None = None
    profile_from: str = FROM_FILE


@dataclass(frozen=True)
class SavedList:
    """All names, aliases and restrictions that one file has, read at one moment."""

    records: tuple[Saved, ...] = ()
    aliases: tuple[Alias, ...] = ()
    version_keys: tuple[tuple[str, str, tuple[str, ...]], ...] = ()  # (name, version, ids of its keys)
    generation: int = 0  # how often a list that servers share was changed

    @property
    def versions(self) -> frozenset[str]:
        """All versions that the list names, earlier ones included."""
        named = [version for record in self.records for version in (record.version, *record.history)]
        return frozenset(named).union(*(alias.versions for alias in self.aliases))

    def record(self, name: str) -> Saved | None:
        """The record of a name; None if it has none."""
        return next((record for record in self.records if record.name == name), None)


class RegistryFile:
    """The file `path`, which need not exist yet."""

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        """mode: the file's permissions."""
        self.path = path
        self._mode = mode

    def read_list(self, file: BinaryIO) -> SavedList:
        """The names, aliases and restrictions in an open file. Raises OSError if it can't be read, AdapterError if it
        is damaged or of another format."""
        return self._parsed(file.read(_MAX_BYTES + 1), _list)

    def read(self) -> tuple[Saved, ...]:
        """The names written last; empty if there is no file. Raises AdapterError for a file that is unreadable, damaged
        or of another format."""
        return self._read(lambda content: tuple(_saved(record) for record in content["adapters"]))

    def read_aliases(self) -> tuple[Alias, ...]:
        """The aliases written last; empty if there is no file or it is of an old release. Raises as `read`."""
        return self._read(lambda content: tuple(_alias(record) for record in content.get("aliases", [])))

    def read_names(self, part: str) -> tuple[str, ...]:
        """A part of the file that is a list of names; empty if the file lacks it. Raises as `read`."""
        return self._read(lambda content: tuple(str(name) for name in content.get(part, [])))

    def read_version_keys(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """(name, version, ids of the keys that the version was published for). Raises as `read`."""
        return self._read(lambda content: tuple(_version_keys(record) for record in content.get("version_keys", [])))

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes. Only the directory's owner may call it, before the first
        write."""
        for path in self.path.parent.glob(f".{self.path.name}-*"):
            with suppress(OSError):
                path.unlink()

    def _read(self, parse: Callable[[dict[str, Any]], tuple[T, ...]]) -> tuple[T, ...]:
        try:
            with self.path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise AdapterError(ErrorCode.REGISTRY_UNREADABLE, f"{self.path} cannot be read: {error.strerror}") from None
        return self._parsed(content, parse)

    def _parsed(self, data: bytes, parse: Callable[[dict[str, Any]], P]) -> P:
        if len(data) > _MAX_BYTES:
            raise AdapterError(ErrorCode.REGISTRY_DAMAGED, f"{self.path} is too large to be ours; move it away")
        try:
            content = parse_object(data)
            if content["format"] != _FORMAT:
                raise AdapterError(
                    ErrorCode.REGISTRY_DAMAGED, f"{self.path} has a format of another version of Guanaco; move it away"
                )
            return parse(content)
        except (JsonError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise AdapterError(ErrorCode.REGISTRY_DAMAGED, f"{self.path} is damaged; move it away") from None

    def write(
        self,
        records: Iterable[Saved],
        aliases: Iterable[Alias] = (),
        version_keys: Iterable[dict[str, Any]] = (),
        **names: Iterable[str],
    ) -> None:
        """Replace the file. names: further parts, each a list of names. Raises OSError; then the old file is still
        there."""
        lists = {part: sorted(listed) for part, listed in names.items()}
        self._replace({**_content(records, aliases), "version_keys": list(version_keys), **lists})

    def write_list(self, listed: SavedList, **names: Iterable[str]) -> None:
        """As `write`, from a whole list."""
        keys = [{"name": name, "version": version, "keys": list(ids)} for name, version, ids in listed.version_keys]
        lists = {part: sorted(named) for part, named in names.items()}
        content = _content(listed.records, listed.aliases)
        self._replace({**content, "generation": listed.generation, "version_keys": keys, **lists})

    def _replace(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=1)
        handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(handle, self._mode)
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_directory(self.path.parent)


def _content(records: Iterable[Saved], aliases: Iterable[Alias]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "adapters": [asdict(record) for record in records],
        "aliases": [asdict(alias) for alias in aliases],
    }


def _list(content: dict[str, Any]) -> SavedList:
    generation = content.get("generation", 0)
    if type(generation) is not int:
        raise TypeError("a generation is a number")
    records = tuple(_saved(record) for record in content["adapters"])
    aliases = tuple(_alias(record) for record in content.get("aliases", []))
    # Other programs can write this file: a name must not stand for two versions, nor a version lead out of its folder.
    if any(NAME.fullmatch(record.name) is None for record in records) or len(aliases) > MAX_ALIASES:
        raise ValueError("no name, or too many")
    for names in ([record.name for record in records], [alias.name for alias in aliases]):
        if len(set(names)) != len(names):
            raise ValueError("a name is there twice")
    if any(_VERSION.fullmatch(version) is None for one in records for version in (one.version, *one.history)):
        raise ValueError("a version is a digest")
    return SavedList(
        records=records,
        aliases=aliases,
        version_keys=tuple(_version_keys(record) for record in content.get("version_keys", [])),
        generation=generation,
    )


def _saved(record: object) -> Saved:
    if not isinstance(record, dict):
        raise TypeError("a record is an object")
    name, version, source, effect = (record.get(key) for key in ("name", "version", "source", "effect"))
    history = record.get("history", [])
    if not all(isinstance(value, str) for value in (name, version, source, *history)):
        raise TypeError("names, versions and sources are text")
    profile = record.get("profile")
    if not isinstance(profile, dict | None):
        raise TypeError("a profile is an object")
    # A file of an earlier release lacks this field: a restriction must not be lost with the next load.
    origin = record.get("profile_from", GIVEN if "allowed_keys" in (profile or {}) else FROM_FILE)
    if origin not in (FROM_FILE, GIVEN, KEPT):
        raise ValueError("no origin of a profile")
    effect = None if effect is None else float(effect)
    return Saved(str(name), str(version), str(source), tuple(history), effect, profile, origin)


def _version_keys(record: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    if not isinstance(record["keys"], list) or not all(isinstance(key, str) for key in record["keys"]):
        raise TypeError("keys are a list of text")
    return str(record["name"]), str(record["version"]), tuple(record["keys"])


def _alias(record: dict[str, Any]) -> Alias:
    if NAME.fullmatch(record["name"]) is None:
        raise ValueError("no name")
    return Alias(record["name"], _revision(record["now"]), tuple(_revision(past) for past in record["history"]))


def _revision(record: dict[str, Any]) -> Revision:
    targets = tuple(Target(str(t["name"]), t["version"], int(t["weight"])) for t in record["targets"])
    if not any(target.weight > 0 for target in targets) or any(target.weight < 0 for target in targets):
        raise ValueError("weights lead somewhere")
    if any(target.version is not None and _VERSION.fullmatch(target.version) is None for target in targets):
        raise ValueError("a version is a digest")
    return Revision(int(record["number"]), float(record["changed_at"]), targets)
