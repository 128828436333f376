"""What can be wrong with a model that an operator points at. Each message says what, and what to do about it."""


class ModelError(Exception):
    """A model that cannot be loaded or run here: the command line prints the message as one line and exits with 2."""


class TemplateError(Exception):
    """A chat template that is wrong, refuses the messages, or does what the sandbox does not allow.

    code: "template_error" for these; "template_timeout" and "template_too_large" where it took more time, memory or
    output than it may; "template_crashed" where it ended the process that rendered it; "template_busy" and
    "template_unavailable" where it was not rendered for no fault of its own.
    """

    def __init__(self, message: str, code: str = "template_error") -> None:
        super().__init__(message)
        self.code = code


class TokenizerError(Exception):
    """A tokenizer that breaks down on a text, as one whose patterns backtrack without end does."""
