"""The errors that end a training. Each message is one line for the operator; a TrainingError also has a code."""

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import OperatorError


class TrainingError(OperatorError):
    """A training can't start or can't go on. The message says why and what to do. Nothing half-written is left at the
    adapter's place."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class TrainingStopped(OperatorError):
    """A training was told to stop, and has written a checkpoint."""
