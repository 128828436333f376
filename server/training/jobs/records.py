"""The records of uploaded files and jobs: plain data that is written as JSON, and OpenAI's objects made from them.

Knows no disk, no process and no HTTP. `owner` is a digest of an API key, never the key.
"""

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

FILE, JOB, EVENT, CHECKPOINT = "file", "ftjob", "ftevent", "ftckpt"  # prefixes of ids
TRAINING, RESULTS = "fine-tune", "fine-tune-results"  # purposes of files


@dataclass(frozen=True)
class Owner:
    """The API key that made something. `key_id` is what a profile's `allowed_keys` names."""

    digest: str
    key_id: str


@dataclass(frozen=True)
class StoredFile:
    """One file of a key."""

    id: str
    owner: str
    bytes: int
    created_at: int  # seconds since the epoch
    filename: str  # only shown, never used as a path
    purpose: str = TRAINING

    def public(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Status(StrEnum):
    """OpenAI's states of a job."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True)
class Hyperparameters:
    """None stands for `auto`: the trainer chooses."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None

    def public(self) -> dict[str, Any]:
        return {name: "auto" if value is None else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that the trainer wrote, with the last losses that were logged before it."""

    id: str
    step: int
    created_at: int
    train_loss: float | None = None
    valid_loss: float | None = None


@dataclass(frozen=True)
class Job:
    """One job. A change makes a new record."""

    id: str
    owner: str
    key_id: str
    created_at: int
    model: str  # the base's name, as the client gave it
    training_file: str
    seed: int
    name: str  # of the adapter, if the name is still free at the end
    suffix: str | None = None
    validation_file: str | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    metadata: dict[str, str] = field(default_factory=dict)
    status: Status = Status.VALIDATING
    is_publishing: bool = False  # a running job whose training is over
    num_rows: int | None = None  # of the training file
    step: int = 0  # the last step that was logged
    steps: int = 0  # of the whole training; 0: not known yet
    train_seconds: float = 0.0
    num_idle_starts: int = 0  # starts of the process since a step was logged
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    version: str | None = None  # content digest of the adapter; set before it is published
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: tuple[str, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    error: dict[str, Any] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The ids of the files that the job reads."""
        return (self.training_file,) if self.validation_file is None else (self.training_file, self.validation_file)

    def public(self) -> dict[str, Any]:
        """OpenAI's job object."""
        hyperparameters = self.hyperparameters.public()
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "error": self.error,
            "estimated_finish": None if self.status.is_final else self.estimated_finish,
            "fine_tuned_model": self.fine_tuned_model,
            "finished_at": self.finished_at,
            "hyperparameters": hyperparameters,
            "integrations": [],
            "metadata": self.metadata,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "model": self.model,
            "organization_id": "guanaco",
            "result_files": list(self.result_files),
            "seed": self.seed,
            "status": self.status.value,
            "trained_tokens": self.trained_tokens,
            "training_file": self.training_file,
            "user_provided_suffix": self.suffix,
            "validation_file": self.validation_file,
        }

    def public_checkpoints(self) -> list[dict[str, Any]]:
        """OpenAI's checkpoint objects, the latest first."""
        return [
            {
                "id": checkpoint.id,
                "object": "fine_tuning.job.checkpoint",
                "created_at": checkpoint.created_at,
                "fine_tuned_model_checkpoint": f"{self.fine_tuned_model or self.name}:ckpt-step-{checkpoint.step}",
                "fine_tuning_job_id": self.id,
                "metrics": _without_none(
                    step=checkpoint.step, train_loss=checkpoint.train_loss, valid_loss=checkpoint.valid_loss
                ),
                "step_number": checkpoint.step,
            }
            for checkpoint in reversed(self.checkpoints)
        ]

    def saved(self) -> dict[str, Any]:
        """Plain data, for the disk."""
        return asdict(self)

    @classmethod
    def restored(cls, content: dict[str, Any]) -> Self:
        """The job from the data of `saved`. Raises TypeError, ValueError or KeyError for other data."""
        known = {each.name for each in fields(cls)}
        data = {name: value for name, value in content.items() if name in known}
        data["status"] = Status(data["status"])
        data["hyperparameters"] = Hyperparameters(**data["hyperparameters"])
        data["checkpoints"] = tuple(Checkpoint(**each) for each in data["checkpoints"])
        data["result_files"] = tuple(data["result_files"])
        return cls(**data)


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def event(event_id: str, created_at: int, message: str, *, level: str = "info", data: Any = None) -> dict[str, Any]:
    """OpenAI's event object. created_at: seconds since the epoch. data: metrics, if it is an event of metrics."""
    return {
        "object": "fine_tuning.job.event",
        "id": event_id,
        "created_at": created_at,
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }
