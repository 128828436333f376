"""What is told to a client whose demand on the answer cannot be met."""

from guanaco.models.errors import GuanacoError


class GrammarError(GuanacoError):
    """A demand that this server cannot meet. The message says why, holds nothing of the client's, and may be shown.

    param: the request's field at fault, where it is known.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GrammarUnavailable(GuanacoError):
    """Grammars cannot be compiled now, or not here. The message says why, and may be shown.

    is_here: whether trying again helps; False where the library is missing.
    """

    def __init__(self, message: str, *, is_here: bool) -> None:
        super().__init__(message)
        self.is_here = is_here
