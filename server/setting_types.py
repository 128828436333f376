"""The types of settings: sizes, lists, keys, host names, origins. Each can be read from text.

Imports nothing of ours. `server/config.py` declares the settings with them.
"""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match.group(2).lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size: write a number of bytes, or one with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match.group(1)) * _UNITS[match.group(2).lower()])


def _parse_list(value: object) -> object:
    """Split comma-separated text, as environment variables hold lists. Any other value stays as it is."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _key(value: object) -> object:
    """Refuse an empty key, such as one from an unset shell variable: it would let everybody in."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        return value
    if not text.strip():
        raise ValueError(EMPTY_KEY)
    return text.strip()


def _parse_keys(value: object) -> object:
    keys = _parse_list(value)
    if isinstance(value, str) and not keys:
        raise ValueError(EMPTY_KEY)
    return keys


def _host_name(value: object) -> object:
    if isinstance(value, str) and not _HOST_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a host name: write it without a scheme, a port or wildcards")
    return value


_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
EMPTY_KEY = "the key is empty: write a key (is a shell variable unset?), or leave the setting out"

Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(ge=0)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_list)]
Key = Annotated[SecretStr, BeforeValidator(_key)]
Keys = Annotated[tuple[Key, ...], NoDecode, BeforeValidator(_parse_keys)]
HostName = Annotated[str, BeforeValidator(_host_name)]
HostNames = Annotated[tuple[HostName, ...], NoDecode, BeforeValidator(_parse_list)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _parse_origins(value: object) -> object:
    origins = _parse_list(value)
    for origin in origins if isinstance(origins, (tuple, list)) else ():
        if origin != "*" and (_ORIGIN.fullmatch(str(origin)) is None or _DEFAULT_PORT.search(str(origin))):
            raise ValueError("an origin is written as browsers send it: https://chat.example or http://localhost:3000")
    return origins


# Browsers send a scheme, a host in small letters and a port that is not the scheme's own; no path.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")
_DEFAULT_PORT = re.compile(r"^(http://.*:80|https://.*:443)$")
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_origins)]
