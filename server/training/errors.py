"""What can end a training. Each error is one line for the operator, and a code for the job that started it."""

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import OperatorError


class TrainingError(OperatorError):
    """A training that can't start or can't go on. The message says why and what to do; nothing half-written is left
    under the adapter's name."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class TrainingStopped(OperatorError):
    """A training that was told to stop, and has written a checkpoint."""
