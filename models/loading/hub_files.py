"""A few named files of a Hugging Face repository, at one commit: found, measured, and only then downloaded.

Does not look into the files. The hub's library keeps downloads in its own layout, and reads HF_HUB_OFFLINE itself.
Called by the server to load adapters.
"""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.hub_errors import LIBRARY_ERRORS, OF_ADAPTERS, HubError, explained
from guanaco.models.loading.hub import progress_bar

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ANSWER_SECONDS = 8.0  # for each request before the download; the download has the library's own limits


@dataclass(frozen=True)
class Snapshot:
    """The directory with the files, and their commit."""

    path: Path
    commit: str


def fetch_files(
    repository: str,
    revision: str,
    most_bytes: Mapping[str, int],
    *,
    required: tuple[str, ...],
    cache_dir: Path,
    shared_cache: Path | None = None,
    offline: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Snapshot:
    """Download files of one revision, or find them in a cache.

    most_bytes: file name → the largest size that is accepted. required: the files that must exist; others may be
    missing. The hub is not asked about a commit that is in `cache_dir` or `shared_cache` already. Raises HubError.
    """
    spec = f"{repository}@{revision}"

    def snapshot(commit: str, *, is_local: bool, cache_dir: Path = cache_dir) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=commit,
                cache_dir=cache_dir,
                token=token,
                local_files_only=is_local,
                allow_patterns=list(most_bytes),
                max_workers=2,
                tqdm_class=progress_bar(None),
                endpoint=endpoint,
            )
        )

    offline = offline or huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if offline or _COMMIT.fullmatch(revision):
            for cache in (cache_dir, *(() if shared_cache is None else (shared_cache,))):
                with contextlib.suppress(LocalEntryNotFoundError, IncompleteSnapshotError):
                    path = snapshot(revision, is_local=True, cache_dir=cache)
                    if all((path / name).exists() for name in required):
                        return Snapshot(path, path.name)
            if offline:
                raise HubError(
                    ErrorCode.HUB_OFFLINE,
                    f"{spec} was not downloaded before, and this server is offline: pull it elsewhere",
                )
        commit = _look(HfApi(endpoint=endpoint, token=token), repository, revision, most_bytes, required)
        path = snapshot(commit, is_local=False)
    except LIBRARY_ERRORS as error:
        raise explained(error, OF_ADAPTERS, spec=spec, repository=repository, revision=revision) from error
    for name, most in most_bytes.items():
        if (path / name).exists() and (path / name).stat().st_size > most:  # the hub may have stated another size
            raise _too_large(spec, name, most)
    _remember(path, revision)
    return Snapshot(path, commit)


def _remember(snapshot: Path, revision: str) -> None:
    """Record which commit a branch was, as the library does when it downloads a branch, so that it is found offline."""
    if revision != snapshot.name and ".." not in revision.split("/"):
        reference = snapshot.parent.parent / "refs" / revision
        with contextlib.suppress(OSError):
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(snapshot.name)


def _look(api: HfApi, repository: str, revision: str, most_bytes: Mapping[str, int], required: tuple[str, ...]) -> str:
    """The commit of a revision. Raises HubError if a required file is missing or a file is too large."""
    spec = f"{repository}@{revision}"
    commit = api.model_info(repository, revision=revision, timeout=_ANSWER_SECONDS).sha
    if commit is None or _COMMIT.fullmatch(commit) is None:
        raise HubError(ErrorCode.HUB_FAILED, f"the hub did not say which commit {spec} is; try again later")
    sizes = {file.path: getattr(file, "size", 0) for file in api.list_repo_tree(repository, revision=commit)}
    for name in required:
        if name not in sizes:
            pickles = sorted(other for other in sizes if other.endswith((".bin", ".pt", ".pth")))
            hint = f"; {pickles[0]} is a pickle: download it yourself, then `guanaco adapters convert`"
            raise HubError(
                ErrorCode.HUB_INCOMPLETE, f"{spec} has no {name}{hint if pickles else ': is it a PEFT adapter?'}"
            )
    for name, most in most_bytes.items():
        if sizes.get(name, 0) > most:
            raise _too_large(spec, name, most)
    return commit


def _too_large(spec: str, name: str, most: int) -> HubError:
    return HubError(ErrorCode.FILE_TOO_LARGE, f"{name} of {spec} is larger than {most} bytes")
