"""JSON exactly by the standard: UTF-8, one value per key, finite numbers. Untrusted files are read with it.

Called by the readers of adapters, models and their headers.
"""

import json
from pathlib import Path
from typing import Any

from guanaco.models.errors import GuanacoError, ModelError
from guanaco.models.formats.shown import printable
from guanaco.models.formats.small_files import MAX_JSON_BYTES, read_small


class JsonError(GuanacoError, ValueError):
    """Data that are not an acceptable JSON object. The message continues a sentence that begins with the file's
    name."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises ModelError if the file is absent or holds anything else.

    Numbers and repeated keys are read as transformers reads them: a model that others load is not refused for those.
    """
    try:
        return parse_object(read_small(path, MAX_JSON_BYTES), is_strict=False)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a model directory needs it; download the model again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); download the model again") from error
    except JsonError as error:
        raise ModelError(f"{path} {error}; download the model again") from error


def parse_object(data: bytes, *, is_strict: bool = True) -> dict[str, Any]:
    """The JSON object in `data`. Keys keep their order.

    Raises JsonError for another encoding, a byte order mark, a repeated key (readers disagree about which value
    counts), NaN or Infinity in any spelling, nesting deeper than Python's stack, and a value that is not an object.
    Unless `is_strict`, the last value of a repeated key counts, and NaN and Infinity are numbers.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8 (byte {error.start})") from None
    if text.startswith("\ufeff"):
        raise JsonError("starts with a byte order mark")
    try:
        value = json.loads(text, **(_STRICT if is_strict else {}))
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # an integer with more digits than Python converts
        raise JsonError("holds a number that is too long") from None
    if not isinstance(value, dict):
        raise JsonError("is JSON, but not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"has the key {printable(key)} twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> float:
    raise JsonError(f"holds {name}, which is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise JsonError(f"holds {text[:40]}, which is too large for a number")
    return value


_STRICT: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_constant, "parse_float": _finite}
