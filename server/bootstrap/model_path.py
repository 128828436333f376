"""Finds the settings' model on this disk, or downloads it. Called by `runtime` and by training."""

import os
from pathlib import Path

from rich.console import Console

from guanaco.models.loading.demo import ensure_demo_model
from guanaco.server.bootstrap.progress import Report, reporting
from guanaco.server.config import Settings


def find_model(settings: Settings, console: Console, watch: Report | None = None) -> Path:
    """The path of the settings' model, a directory or a .gguf file; of the demo model if the settings name none.

    Blocks while it downloads. A path that exists comes before a hub id of the same spelling. A model of the hub, and
    the demo model, are downloaded if need be and kept in the cache.

    console: shows the progress. watch: also gets it, as in `reporting`.

    Raises ModelError if there is no such path or hub model, if the download fails, or if the settings say offline and
    the model is not in the cache.
    """
    if settings.model is None:
        with reporting(console, "demo model", watch) as report:
            return ensure_demo_model(settings.cache_dir, offline=settings.offline, progress=report)
    path = Path(os.path.expanduser(settings.model))
    if path.exists():
        return path
    from guanaco.models.loading.hub import resolve_model  # here, because a local model does without the hub's library

    with reporting(console, "download", watch) as report:
        return resolve_model(
            settings.model,
            cache_dir=settings.cache_dir / "hub",
            shared_cache=settings.shared_hub_cache,
            offline=settings.offline,
            token=settings.hub_token.get_secret_value() if settings.hub_token else None,
            progress=report,
        )
