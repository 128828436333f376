"""The answers of the routes of training, and an example of each JSON body. Only servers that train have them."""

from collections.abc import Mapping
from typing import Any

from guanaco.server.api.document.schemas import (
    BOOLEAN,
    COUNT,
    INTEGER,
    OBJECT,
    STRING,
    Schema,
    array,
    const,
    made_of,
    or_null,
    ref,
)

_CHOSEN: Schema = {"anyOf": [{"type": "number"}, const("auto")]}
_HYPERPARAMETERS = made_of(n_epochs=_CHOSEN, batch_size=_CHOSEN, learning_rate_multiplier=_CHOSEN)


def _list_of(name: str) -> Schema:
    return made_of(
        object=const("list"), data=array(ref(name)), first_id=or_null(STRING), last_id=or_null(STRING), has_more=BOOLEAN
    )


TRAINING_ANSWERS: Mapping[str, Schema] = {
    "File": made_of(
        id=STRING,
        object=const("file"),
        bytes=COUNT,
        created_at=INTEGER,
        expires_at=or_null(INTEGER),
        filename=STRING,
        purpose={"enum": ["fine-tune", "fine-tune-results"]},
        status=const("processed"),
        status_details=or_null(STRING),
    ),
    "FileList": _list_of("File"),
    "Deleted": made_of(id=STRING, object={"enum": ["file", "model"]}, deleted=const(True)),
    "FineTuningJob": made_of(
        id=STRING,
        object=const("fine_tuning.job"),
        created_at=INTEGER,
        error=or_null(made_of(code=STRING, message=STRING, param=or_null(STRING))),
        estimated_finish=or_null(INTEGER),
        fine_tuned_model=or_null(STRING),
        finished_at=or_null(INTEGER),
        hyperparameters=_HYPERPARAMETERS,
        integrations=array(OBJECT),
        metadata={"type": "object", "additionalProperties": STRING},
        method=made_of(type=const("supervised"), supervised=made_of(hyperparameters=_HYPERPARAMETERS)),
        model=STRING,
        organization_id=STRING,
        result_files=array(STRING),
        seed=COUNT,
        status={"enum": ["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]},
        trained_tokens=or_null(COUNT),
        training_file=STRING,
        user_provided_suffix=or_null(STRING),
        validation_file=or_null(STRING),
    ),
    "FineTuningJobList": _list_of("FineTuningJob"),
    "FineTuningEvent": made_of(
        id=STRING,
        object=const("fine_tuning.job.event"),
        created_at=INTEGER,
        level={"enum": ["info", "warn", "error"]},
        message=STRING,
        type={"enum": ["message", "metrics"]},
        data=or_null(OBJECT),
    ),
    "FineTuningEventList": _list_of("FineTuningEvent"),
    "FineTuningCheckpoint": made_of(
        id=STRING,
        object=const("fine_tuning.job.checkpoint"),
        created_at=INTEGER,
        fine_tuned_model_checkpoint=STRING,
        fine_tuning_job_id=STRING,
        metrics=OBJECT,
        step_number=COUNT,
    ),
    "FineTuningCheckpointList": _list_of("FineTuningCheckpoint"),
}

# (method, path) → the name of the answer's schema; None: the answer is not JSON.
TRAINING_ANSWER_OF: Mapping[tuple[str, str], str | None] = {
    ("post", "/v1/files"): "File",
    ("get", "/v1/files"): "FileList",
    ("get", "/v1/files/{file_id}"): "File",
    ("get", "/v1/files/{file_id}/content"): None,
    ("delete", "/v1/files/{file_id}"): "Deleted",
    ("post", "/v1/fine_tuning/jobs"): "FineTuningJob",
    ("get", "/v1/fine_tuning/jobs"): "FineTuningJobList",
    ("get", "/v1/fine_tuning/jobs/{job_id}"): "FineTuningJob",
    ("post", "/v1/fine_tuning/jobs/{job_id}/cancel"): "FineTuningJob",
    ("get", "/v1/fine_tuning/jobs/{job_id}/events"): "FineTuningEventList",
    ("get", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): "FineTuningCheckpointList",
    ("delete", "/v1/models/{name}"): "Deleted",
}

TRAINING_EXAMPLES: Mapping[str, dict[str, Any]] = {
    "/v1/fine_tuning/jobs": {
        "model": "smollm2-135m-instruct",
        "training_file": "file-0123456789abcdef01234567",
        "suffix": "support",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    },
}
