"""The limits of training over the API, each with its setting: of one upload, of one key, and of the whole server."""

from dataclasses import dataclass

WINDOW_SECONDS = 24 * 3600.0  # a key's steps and hours count for so long
MAX_LOG_BYTES = 4 << 20  # of a job's log.txt; a longer log is cut to a last quarter of this


@dataclass(frozen=True)
class TrainLimits:
    """The limits. Those `per_key` count for each API key by itself."""

    max_file_bytes: int = 512 << 20  # of one file
    max_files_per_key: int = 100
    max_bytes_per_key: int = 1 << 30  # of a key's uploaded files together
    max_jobs_per_key: int = 4  # jobs that wait or run
    max_steps_per_key: int = 20_000  # optimiser steps in WINDOW_SECONDS
    max_hours_per_key: float = 24.0  # of training in WINDOW_SECONDS
    max_kept_jobs_per_key: int = 200  # finished jobs; older ones go, unless they still count in the window
