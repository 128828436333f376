"""The class of `guanaco train`: with --json every error is a JSON object, also that of a wrong command line.

Used by `main`. `run.py` raises the errors of the training itself.
"""

import json
from typing import Any

from typer.exceptions import TyperException

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import OperatorError
from guanaco.server.commands.classes import OfflineCommand

_JSON_FLAG = "--json"
EXIT_FAILED = 1  # with --json; the object on standard output says why


class TrainCommand(OfflineCommand):
    """A command whose errors are JSON objects if --json is given."""

    def make_context(self, info_name: str | None, args: list[str], *given: Any, **options: Any) -> Any:
        """Read the command line. With --json an unknown, missing or malformed option ends with a JSON object and
        exit code 1."""
        if _JSON_FLAG not in args:
            return super().make_context(info_name, args, *given, **options)
        try:
            return super().make_context(info_name, args, *given, **options)
        except TyperException as error:
            flag = getattr(getattr(error, "param", None), "opts", None) or [getattr(error, "option_name", None)]
            words = getattr(error, "format_message", error.__str__)()
            tell_error(ErrorCode.BAD_OPTION, " ".join(words.split()), flag[-1])
            raise SystemExit(EXIT_FAILED) from None

    def invoke(self, ctx: Any) -> Any:
        """Read the settings and run the command."""
        as_json = ctx.params.get("as_json")
        try:
            return super().invoke(ctx)
        except OperatorError as error:
            if not as_json:
                raise
            tell_error(getattr(error, "code", ErrorCode.BAD_OPTION), str(error))
            raise SystemExit(EXIT_FAILED) from None


def tell_error(code: ErrorCode | str, message: str, param: str | None = None) -> None:
    """Print the JSON object of an error, in the shape of the API's errors."""
    print(json.dumps({"error": {"code": str(code), "message": message, "param": param}}), flush=True)
