"""What can be wrong with a model that an operator points at. Each message says what, and what to do about it."""


class ModelError(Exception):
    """A model that cannot be loaded or run here: the command line prints the message as one line and exits with 2."""
