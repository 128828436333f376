"""Adapters of the Hugging Face Hub as sources: `org/name@revision`. Fetching one finds the commit of its revision.

Only the config, the safetensors weights and the profile are ever downloaded. Its calls block, so they belong on a
thread. Used by the adapter sources, and by `guanaco adapters pull`.
"""

import os
import re
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME, MAX_CONFIG_BYTES
from guanaco.adapters.peft.weights import WEIGHTS_NAME, AdapterLimits
from guanaco.adapters.versions.profile import MAX_PROFILE_BYTES, PROFILE_NAME
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.leftovers import PartialFolder
from guanaco.server.config import Settings

_ADDRESS = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})@([A-Za-z0-9][\w./-]{0,127})")


@dataclass(frozen=True)
class HubAddress:
    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> "HubAddress | None":
        """`org/name@revision`; None for anything else."""
        match = _ADDRESS.fullmatch(text)
        return None if match is None or ".." in text else cls(match[1], match[2])

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class AdapterHub:
    """One hub and its cache, with the operator's settings."""

    cache_dir: Path
    offline: bool = False
    token: str | None = None
    endpoint: str | None = None
    shared_cache: Path | None = None  # the cache of other tools: files found there are not downloaded
    allows_unpinned: bool = False  # a source may be org/name alone, which means the latest commit of main
    max_weights_bytes: int = AdapterLimits().max_file_bytes

    @classmethod
    def of(cls, settings: Settings) -> "AdapterHub":
        """The hub, cache and token of a server's settings; models are downloaded with the same."""
        token = None if settings.hub_token is None else settings.hub_token.get_secret_value()
        shared = settings.shared_hub_cache
        return cls(
            settings.cache_dir / "hub",
            offline=settings.offline,
            token=token,
            shared_cache=shared,
            allows_unpinned=settings.hub_adapters_unpinned,
        )

    def address(self, source: str) -> HubAddress | None:
        """The hub address that a source names; None if it can only be a path."""
        return HubAddress.parse(source) or (HubAddress.parse(f"{source}@main") if self.allows_unpinned else None)

    def fetch(self, address: HubAddress) -> tuple[Path, HubAddress]:
        """Download an adapter, or find it in the cache. Returns the directory with its files, and the address with its
        commit. Raises AdapterError."""
        path, commit = self._fetch(address)
        return path, HubAddress(address.repository, commit)

    def pull(self, address: HubAddress, target: Path) -> HubAddress:
        """Copy an adapter's files into the new directory `target`, which appears whole or not at all. Returns the
        address with its commit. Raises AdapterError."""
        if os.path.lexists(target):
            raise AdapterError(ErrorCode.TARGET_EXISTS, f"{target} is there already; choose another directory")
        path, pinned = self.fetch(address)
        try:
            with closing(PartialFolder(target)) as partial:
                inner = partial.path / target.name
                inner.mkdir()
                for name in (CONFIG_NAME, WEIGHTS_NAME, PROFILE_NAME):
                    if (path / name).exists():
                        shutil.copyfile(path / name, inner / name)
                inner.rename(target)
        except OSError as error:
            raise AdapterError(ErrorCode.TARGET_UNWRITABLE, f"{target} cannot be written: {error.strerror}") from None
        return pinned

    def _fetch(self, address: HubAddress) -> tuple[Path, str]:
        """The directory with the files, and their commit."""
        # Imported here: a server that uses no hub does not load the hub's library.
        from guanaco.models.formats.hub_errors import HubError
        from guanaco.models.loading.hub_files import fetch_files

        try:
            snapshot = fetch_files(
                address.repository,
                address.revision,
                {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: self.max_weights_bytes, PROFILE_NAME: MAX_PROFILE_BYTES},
                required=(CONFIG_NAME, WEIGHTS_NAME),
                cache_dir=self.cache_dir,
                shared_cache=self.shared_cache,
                offline=self.offline,
                token=self.token,
                endpoint=self.endpoint,
            )
        except HubError as error:
            raise AdapterError(error.code, str(error), "source") from None
        return snapshot.path, snapshot.commit
