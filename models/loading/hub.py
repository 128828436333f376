"""A model's name → its local path: a directory, a GGUF file, or a Hugging Face id, which is downloaded.

Does not look into the files. The hub's library resumes a lost connection, keeps the complete files of a download that
failed, and reads HF_TOKEN and HF_HUB_OFFLINE itself. Called when a server or command starts.
"""

import io
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from guanaco.models.errors import ModelError
from guanaco.models.formats.hub_errors import LIBRARY_ERRORS, OF_MODELS, explained
from guanaco.models.loading.checkpoint import PICKLE_SUFFIXES, pickles_refused
from guanaco.models.loading.progress import Progress

# Weights, and what a tokenizer and its chat template need. Never a pickle, never code.
ALLOWED_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
# Folders of a repository hold other formats of the same weights, or parts of other models.
IGNORED_FILES = ("*/*", "adapter_model.safetensors", "consolidated*.safetensors")

_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def resolve_model(
    spec: str,
    *,
    cache_dir: Path | None = None,
    shared_cache: Path | None = None,
    offline: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    endpoint: str | None = None,
) -> Path:
    """The local path of `spec`: an existing path, or a hub id `org/name[@revision]`, which is downloaded if need be.

    cache_dir: where downloads are kept, in the hub's own layout; None: in the cache that other tools use, too.
    shared_cache: another cache of that layout. A repository that only it has is read from there, and updates of it are
    written there. offline: use no network, only earlier downloads. progress: called from several threads, with bytes.

    Raises ModelError for a path that does not exist, and for an id that cannot be downloaded.
    """
    path = Path(os.path.expanduser(spec))
    if path.exists():
        return path
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise ModelError(f"{spec} does not exist: give a model directory, a .gguf file, or a hub id like org/name")
    repository, revision = match["repository"], match["revision"]
    offline = offline or huggingface_hub.constants.HF_HUB_OFFLINE
    cache_dir = _cache_with(repository, revision, cache_dir, shared_cache, offline=offline)
    try:
        snapshot = Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=offline,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(IGNORED_FILES),
                tqdm_class=progress_bar(progress),
                endpoint=endpoint,
            )
        )
    except LIBRARY_ERRORS as error:
        raise explained(
            error, OF_MODELS, spec=spec, repository=repository, revision=revision, offline=offline
        ) from error
    if not any(snapshot.glob("*.safetensors")):
        raise _without_weights(spec, repository, snapshot, cache_dir, offline=offline)
    return snapshot


def _cache_with(
    repository: str, revision: str | None, own: Path | None, shared: Path | None, *, offline: bool
) -> Path | None:
    """The cache to use: the shared one if only that has the repository (offline: the revision), else our own."""
    if shared is None or own is None or _has_snapshot(own, repository, revision, offline=offline):
        return own
    if not _has_snapshot(shared, repository, revision, offline=offline):
        return own
    is_writable = os.access(shared / _folder(repository), os.W_OK)
    return shared if offline or is_writable else own


def _has_snapshot(cache: Path, repository: str, revision: str | None, *, offline: bool) -> bool:
    """Whether a cache has a snapshot of the repository with weights; offline, whether it has this revision."""
    folder = cache / _folder(repository)
    revision = revision or "main"
    try:
        commit = (folder / "refs" / revision).read_text().strip() if ".." not in revision.split("/") else revision
    except (OSError, UnicodeDecodeError):
        commit = revision
    try:
        snapshots = [folder / "snapshots" / commit] if offline else [*(folder / "snapshots").iterdir()]
        return any(next(snapshot.glob("*.safetensors"), None) is not None for snapshot in snapshots)
    except (OSError, ValueError):
        return False


def _folder(repository: str) -> str:
    return "models--" + repository.replace("/", "--")


def _without_weights(
    spec: str, repository: str, snapshot: Path, cache_dir: Path | None, *, offline: bool
) -> ModelError:
    """The refusal of a repository without usable weights. Its list of files was kept beside the download."""
    try:
        tree = get_cached_repo_tree(repository, revision=snapshot.name, cache_dir=cache_dir)
        names = [file.path for file in tree]
    except CachedRepoTreeNotFoundError:
        names = []
        if offline:  # another tool downloaded a few of its files, and the others are not known
            return ModelError(f"{spec} was downloaded without its weights: go online and start again")
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        return pickles_refused(spec)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        return ModelError(f"{spec} holds GGUF files: download one of them ({ggufs[0]}, say) and give its path")
    return ModelError(f"{spec} holds no safetensors weights: give the id of a repository that does")


def progress_bar(progress: Progress | None) -> type[Any]:
    """A bar that draws nothing and hands the bytes of the whole download to `progress`."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The library makes several bars. Only the one that counts bytes on disk has a true total.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            kwargs |= {"file": io.StringIO(), "disable": False}
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if progress is not None and self._counts and self.total:
                progress("download", int(self.n), int(self.total))
            return shown

    return Bar
