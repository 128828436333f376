"""`guanaco models list | prune`: list the cached models, and delete some."""

import time
from pathlib import Path

from guanaco.models.loading.model_cache import list_cached_models, prune_cached_models
from guanaco.server.bootstrap.memory_plan import human_bytes
from guanaco.server.errors import CommandError

_KEY_LENGTH = 12  # first digits of a key (64 hex digits) that are shown; `prune` accepts any number of first digits


def list_models(cache_dir: Path) -> None:
    """Print a table of the cached models with their total size."""
    entries = list_cached_models(cache_dir)
    if not entries:
        print(f"{cache_dir}: nothing is cached")
        return
    print(f"{'name':{_KEY_LENGTH}}  {'size':>10}  {'last used':16}  made from")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used_seconds))
        print(f"{entry.key[:_KEY_LENGTH]}  {human_bytes(entry.num_bytes):>10}  {used}  {entry.source}")
    print(f"{cache_dir}: {human_bytes(sum(entry.num_bytes for entry in entries))} in {len(entries)} models")


def prune_models(cache_dir: Path, names: list[str], *, yes: bool) -> None:
    """Delete the models whose keys begin with one of `names`, or all without names. Asks first unless `yes`.

    Raises CommandError for an empty name, which would fit every model, and for a name that fits no cached model.
    """
    if not all(name.strip() for name in names):
        raise CommandError(
            "a name is empty: give the first digits of a name in `guanaco models list`, or no name for all"
        )
    entries = list_cached_models(cache_dir)
    chosen = [e for e in entries if not names or any(e.key.startswith(name) for name in names)]
    for name in names:
        if not any(e.key.startswith(name) for e in entries):
            raise CommandError(f"no cached model is called {name!r}: `guanaco models list` shows what there is")
    if not chosen:
        print(f"{cache_dir}: nothing is cached")
        return
    size = human_bytes(sum(entry.num_bytes for entry in chosen))
    if not yes and not _agrees(f"delete {len(chosen)} cached models, {size}? [y/N] "):
        print("nothing was deleted")
        return
    deleted, busy = prune_cached_models(cache_dir, [entry.key for entry in chosen])
    print(f"deleted {len(deleted)} models, {human_bytes(sum(entry.num_bytes for entry in deleted))}")
    for entry in busy:
        print(f"{entry.key[:_KEY_LENGTH]} is in use by another process and was left")


def _agrees(question: str) -> bool:
    """Whether the operator says yes. Without a terminal the answer is no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, UnicodeDecodeError):
        print()
        return False
