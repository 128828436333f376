"""The exceptions that every part derives from, and those of a model that an operator points at.

Ground floor: everything but the kernels may import it. The kernels are a library below it and raise Python's own
exceptions. Each message says what is wrong and what to do about it.
"""

from guanaco.models.error_codes import ErrorCode


class GuanacoError(Exception):
    """The base of all exceptions of ours."""


class OperatorError(GuanacoError):
    """Something that the operator can put right: the command line prints the message as one line and exits with 2."""


class ModelError(OperatorError):
    """A model that cannot be loaded or run here."""


class TemplateError(OperatorError):
    """A chat template that is wrong, refuses the messages, or does what the sandbox does not allow.

    code: TEMPLATE_ERROR for these; TEMPLATE_TIMEOUT and TEMPLATE_TOO_LARGE where it took more time, memory or output
    than it may; TEMPLATE_CRASHED where it ended the process that rendered it; TEMPLATE_BUSY and TEMPLATE_UNAVAILABLE
    where it was not rendered for no fault of its own.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.TEMPLATE_ERROR) -> None:
        super().__init__(message)
        self.code = code


class TokenizerError(GuanacoError):
    """A tokenizer that breaks down on a text, as one whose patterns backtrack without end does."""
