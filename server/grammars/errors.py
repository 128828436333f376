"""The errors for grammars that can't be enforced."""

from guanaco.models.errors import GuanacoError


class GrammarError(GuanacoError):
    """A grammar that this server can't enforce. The message says why and holds no client text, so it may be shown.

    param: the request's field at fault, if it is known.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GrammarUnavailable(GuanacoError):
    """Grammars can't be compiled now, or not on this server. The message says why, and may be shown.

    is_here: whether this server has the library, so that trying again helps.
    """

    def __init__(self, message: str, *, is_here: bool) -> None:
        super().__init__(message)
        self.is_here = is_here
