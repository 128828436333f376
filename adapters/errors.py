"""What can be wrong with an adapter. `code` is stable and machine-readable; the message names the field or tensor."""


class AdapterError(Exception):
    """An adapter that is refused. `code` in snake_case (`rank_too_large`), `field` the config field or tensor at fault."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.field = field
