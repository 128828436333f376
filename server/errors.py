"""The error of a command that can't be carried out. Its message says what to do; exit code 2."""

from guanaco.models.errors import OperatorError


class CommandError(OperatorError):
    """A command that cannot be carried out as it was given."""
