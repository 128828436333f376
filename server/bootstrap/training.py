"""Builds the training service from the settings: the base's directory, the limits of a key, the trainer's command.

Starts nothing. Called by `guanaco serve`, which gives the result to the API.
"""

import logging
import os
from pathlib import Path

from guanaco.server.config import ENV_PREFIX, Settings, harmless_environment
from guanaco.server.errors import CommandError
from guanaco.server.training.jobs.limits import TrainLimits
from guanaco.server.training.jobs.process import TrainerCommand
from guanaco.server.training.jobs.service import TrainingService
from guanaco.server.training.recipes import default_learning_rate

logger = logging.getLogger("guanaco.training")


def training_directory(settings: Settings, base_fingerprint: str) -> Path:
    """The directory with the files and jobs of one base. Each base has its own: an adapter fits only its base."""
    given = settings.train_dir
    root = settings.cache_dir / "training" if given is None else Path(os.path.abspath(os.path.expanduser(given)))
    return root / base_fingerprint[:16]


def training_service(
    settings: Settings, base_fingerprint: str, num_threads: int, num_parameters: int
) -> TrainingService | None:
    """The service behind training over the API; None without an admin key.

    num_threads: the server's compute threads. num_parameters: the base's.

    Raises CommandError if the directory can't be used, or if another server uses it."""
    if not settings.has_admin:
        return None
    limits = TrainLimits(
        max_file_bytes=settings.max_train_file_bytes,
        max_files_per_key=settings.max_train_files_per_key,
        max_bytes_per_key=settings.max_train_bytes_per_key,
        max_jobs_per_key=settings.max_train_jobs_per_key,
        max_steps_per_key=settings.max_train_steps_per_key,
        max_hours_per_key=settings.max_train_hours_per_key,
        max_kept_jobs_per_key=settings.max_kept_train_jobs_per_key,
    )
    directory = training_directory(settings, base_fingerprint)
    service = TrainingService(directory, limits, trainer_command(settings, num_threads, num_parameters))
    try:
        notes = service.open()
    except BlockingIOError:
        raise CommandError(f"--train-dir {directory}: another server uses it; name another directory") from None
    except OSError as error:
        raise CommandError(f"--train-dir {directory}: {error.strerror}; name a directory to write to") from None
    for note in notes:
        logger.warning(note)
    return service


def trainer_command(settings: Settings, num_threads: int, num_parameters: int) -> TrainerCommand:
    """The command that starts a trainer for this server's base. It gets the cache and the chat template, but no key, no
    token and no other setting."""
    passed = {**harmless_environment(), f"{ENV_PREFIX}CACHE": str(settings.cache_dir)}
    if settings.chat_template is not None:
        passed[f"{ENV_PREFIX}CHAT_TEMPLATE"] = _absolute(settings.chat_template)
    return TrainerCommand(
        model=None if settings.model is None else _absolute(settings.model),
        threads=settings.train_threads or max(1, num_threads // 2),
        nice=settings.train_nice,
        learning_rate=default_learning_rate(num_parameters),
        variables=passed,
    )


def _absolute(text: str) -> str:
    """The absolute path of a file or directory that exists, since the trainer works in another directory. Any other
    text, such as a hub id, stays as it is."""
    path = Path(os.path.expanduser(text))
    return os.path.abspath(path) if path.exists() else text
