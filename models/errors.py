"""The base exceptions of all parts, and the exceptions about a model that an operator named.

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

    code: TEMPLATE_ERROR for these. TEMPLATE_TIMEOUT and TEMPLATE_TOO_LARGE: it exceeded its time, memory or output.
    TEMPLATE_CRASHED: it ended the process that rendered it. TEMPLATE_BUSY and TEMPLATE_UNAVAILABLE: it was not
    rendered, through no fault of its own.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.TEMPLATE_ERROR) -> None:
        super().__init__(message)
        self.code = code


class TokenizerError(GuanacoError):
    """A tokenizer that fails on a text, for example because its patterns backtrack without end."""
