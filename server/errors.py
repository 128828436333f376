"""What a verb of the command line cannot do, and what to do about it. One line, exit code 2."""

from guanaco.models.errors import OperatorError


class CommandError(OperatorError):
    """A command that cannot be carried out as it was given."""
