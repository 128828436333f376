"""The settings of training over the API: who may train, where files are kept, the processor's share, each key's limits.

A part of `server/config.py`, the only module that reads their values.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from guanaco.server.setting_types import Bytes, Count, Seconds, Texts


class TrainingSettings(BaseModel):
    """Fine-tuning jobs over the API."""

    train_key: Texts = Field(
        (),
        description="id of an API key, as the access log has it, that may upload files and start fine-tuning jobs "
        "besides the admin key; repeat for more",
    )
    train_dir: Path | None = Field(
        None, description="directory for uploaded files, jobs and their adapters; none: training/ in the cache"
    )
    train_threads: Annotated[int, Field(ge=0)] = Field(
        0, description="compute threads of a fine-tuning job; 0: half of the server's, at least one"
    )
    train_nice: Annotated[int, Field(ge=0, le=19)] = Field(
        10, description="niceness of a fine-tuning job: 19 gives way to requests the most"
    )
    max_train_file_bytes: Bytes = Field(512 << 20, description="largest file that may be uploaded for training")
    train_upload_timeout: Seconds = Field(600.0, description="seconds a client may take to upload a file")
    max_train_files_per_key: Count = Field(100, description="most uploaded files of one API key")
    max_train_bytes_per_key: Bytes = Field(1 << 30, description="most bytes of the uploaded files of one API key")
    max_train_jobs_per_key: Count = Field(4, description="most fine-tuning jobs of one API key that wait or run")
    max_train_steps_per_key: Count = Field(
        20_000, description="most optimiser steps of one API key's fine-tuning jobs in 24 hours"
    )
    max_kept_train_jobs_per_key: Count = Field(
        200,
        description="most finished fine-tuning jobs of one API key that are kept, with their events and results; older "
        "ones are removed once they count in no quota",
    )
    max_train_hours_per_key: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        24.0, description="most hours that one API key's fine-tuning jobs may train in 24 hours"
    )
