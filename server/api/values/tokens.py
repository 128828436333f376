"""Token ids and texts that allow, forbid or favour tokens, and those that end an answer."""

import re
from typing import Annotated

from pydantic import BeforeValidator

from guanaco.server.api.values.base import fail, schema

MAX_STOP_STRINGS = 16  # OpenAI: 4; lm-eval's own tasks send six
MAX_STOP_CHARS = 128
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_ALLOWED_TOKEN_IDS = 1 << 18  # more than any vocabulary of ours has
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 128


def _stop_strings(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fail("give a string, or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise fail(f"at most {MAX_STOP_STRINGS} stop strings")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise fail(f"each stop string must have 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def token_ids(value: object, most: int) -> tuple[int, ...]:
    """The token ids in a field; null means none. Raises PydanticCustomError for a wrong type or more than `most`."""
    ids = [] if value is None else value
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise fail("give a list of token ids: integers, 0 or more")
    if len(ids) > most:
        raise fail(f"at most {most} token ids")
    return tuple(ids)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise fail("give an object of token ids and numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise fail(f"at most {MAX_LOGIT_BIAS} token ids")
    if not all(isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) for key in value):
        raise fail("the keys must be token ids, in decimal digits")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise fail("the values must be numbers from -100 to 100")
    biases = {int(key): float(bias) for key, bias in value.items()}
    if len(biases) != len(value):
        raise fail("a token id appears twice")
    return tuple(biases.items())


def _allowed_token_ids(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = token_ids(value, MAX_ALLOWED_TOKEN_IDS)
    if not ids:
        raise fail("give one token id at least, or leave the field out: nothing could be drawn")
    return ids


def _bad_words(value: object) -> tuple[str, ...]:
    words = [] if value is None else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise fail("give a list of strings")
    if len(words) > MAX_BAD_WORDS:
        raise fail(f"at most {MAX_BAD_WORDS} words")
    if any(not word.strip() or len(word) > MAX_BAD_WORD_CHARS for word in words):
        raise fail(f"each word must have 1 to {MAX_BAD_WORD_CHARS} characters, and not only spaces")
    return tuple(dict.fromkeys(words))


IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}

StopStrings = Annotated[
    tuple[str, ...],
    BeforeValidator(_stop_strings),
    schema(anyOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]),
]
StopTokenIds = Annotated[
    tuple[int, ...], BeforeValidator(lambda value: token_ids(value, MAX_STOP_TOKEN_IDS)), schema(**IDS_SCHEMA)
]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_logit_bias),
    schema(type=["object", "null"], additionalProperties={"type": "number", "minimum": -100, "maximum": 100}),
]
AllowedTokenIds = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_allowed_token_ids),
    schema(type=["array", "null"], items={"type": "integer", "minimum": 0}, minItems=1),
]
BadWords = Annotated[
    tuple[str, ...],
    BeforeValidator(_bad_words),
    schema(type=["array", "null"], items={"type": "string", "minLength": 1}, maxItems=MAX_BAD_WORDS),
]
