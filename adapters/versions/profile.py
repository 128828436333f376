"""A profile: how an adapter is served (chat template, stop strings, sampling defaults), and who may use it.

Read from `guanaco.json` beside the adapter, or given by the operator when it is loaded. Belongs to a name, not to a
version: two names may serve the same tensors differently. Called by the registry, the adapter manager and the API.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.config import CONFIG_NAME
from guanaco.adapters.peft.files import AdapterFiles
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.shown import printable
from guanaco.models.formats.small_files import read_small
from guanaco.models.formats.strict_json import JsonError, parse_object

PROFILE_NAME = "guanaco.json"
# Where a name's profile comes from: the file beside the adapter, this load by the operator, or an earlier load.
FROM_FILE, GIVEN, KEPT = "file", "given", "kept"
KEPT_NOTE = "the profile that an earlier load gave was kept; load with a profile to change it, {} takes it away"
MAX_PROFILE_BYTES = 64 << 10
MAX_STOPS, MAX_STOP_CHARS = 4, 128  # the same limits as for a request
MAX_ALLOWED_KEYS = 1024

# The API's own bounds for the same fields of a request: (at least, at most).
_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 1000),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 2.0),
}
_FIELDS = frozenset({"profile", "chat_template", "stop", "allowed_keys", *_BOUNDS})


@dataclass(frozen=True)
class Profile:
    """The serving options of one name. None or empty means the server's own value."""

    chat_template: str | None = None  # a template's name
    stop: tuple[str, ...] = ()  # added to the client's own; they end a text unless the client sets ignore_eos
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    allowed_keys: tuple[str, ...] | None = None  # ids of API keys; None: every client of the server

    @property
    def sampling(self) -> dict[str, float | int]:
        """The sampling defaults that this profile sets, by the request's field names."""
        return {name: value for name in _BOUNDS if (value := getattr(self, name)) is not None}

    def public(self) -> dict[str, Any]:
        """The fields that this profile sets, as plain data; `parse_profile` turns them into an equal profile."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        if self.allowed_keys is not None:
            fields["allowed_keys"] = self.allowed_keys
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


# Guanaco models were trained on this prompt format without a system message. The QLoRA paper (arXiv 2305.14314) sampled
# from them with these settings.
BUILT_IN = {
    "guanaco": Profile(chat_template="guanaco", stop=("### Human", "### Assistant"), temperature=0.7, top_p=0.9),
}


def parse_profile(fields: Mapping[str, Any], templates: frozenset[str]) -> Profile:
    """A profile from JSON data. Raises AdapterError ("bad_profile") that names the field.

    A field `profile` names a built-in profile to start from; the other fields override it. templates: the names that
    chat_template may have.
    """
    if unknown := sorted(set(fields) - _FIELDS):
        raise _bad(unknown[0], f"is no field of a profile; there are {', '.join(sorted(_FIELDS))}")
    base = fields.get("profile")
    if base is not None and base not in (BUILT_IN if isinstance(base, str) else ()):
        raise _bad("profile", f"must be one of {', '.join(BUILT_IN)}")
    profile = Profile() if base is None else BUILT_IN[base]
    changes: dict[str, Any] = {}
    if (template := fields.get("chat_template")) is not None:
        if not isinstance(template, str):
            raise _bad("chat_template", "must be text")
        changes["chat_template"] = template
    if (stop := fields.get("stop")) is not None:
        changes["stop"] = _texts("stop", [stop] if isinstance(stop, str) else stop, MAX_STOPS, MAX_STOP_CHARS)
    if (keys := fields.get("allowed_keys")) is not None:
        changes["allowed_keys"] = _texts("allowed_keys", keys, MAX_ALLOWED_KEYS, 64)
    for name, (least, most) in _BOUNDS.items():
        if (value := fields.get(name)) is None:
            continue
        wanted = int if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not least <= value <= most:
            raise _bad(name, f"must be a number from {least:g} to {most:g}")
        changes[name] = value
    profile = replace(profile, **changes)
    if profile.chat_template is not None and profile.chat_template not in templates:
        raise _bad("chat_template", f"must be the name of a template: {', '.join(sorted(templates))}")
    return profile


def read_profile(path: Path, name: str, templates: frozenset[str], root: Path | None = None) -> Profile | None:
    """The profile beside the adapter at `path` (found as `AdapterFiles.find` does); None if there is none.

    Raises AdapterError for a profile that the server can't honour, as for a faulty adapter.
    """
    files = AdapterFiles.find(path, name, CONFIG_NAME, root)
    if not files.exists(PROFILE_NAME):
        return None
    try:
        fields = parse_object(files.read(PROFILE_NAME, MAX_PROFILE_BYTES))
    except JsonError as error:
        raise AdapterError(ErrorCode.BAD_PROFILE, f"{PROFILE_NAME}: {error}", PROFILE_NAME) from None
    return parse_profile(fields, templates)


def named_profile(text: str, templates: frozenset[str]) -> Profile:
    """The profile that an operator's option gives: the name of a built-in one, or a JSON file. Raises AdapterError
    ("bad_profile")."""
    return parse_profile(profile_fields(text), templates)


def profile_fields(text: str) -> dict[str, Any]:
    """The fields of the profile that an operator's option names (see `named_profile`), unchecked.

    Raises AdapterError ("bad_profile") if it is neither a built-in profile nor a readable JSON file.
    """
    if text in BUILT_IN:
        return {"profile": text}
    try:
        return parse_object(read_small(Path(os.path.expanduser(text)), MAX_PROFILE_BYTES))
    except OSError as error:
        problem = f"is neither a built-in profile ({', '.join(BUILT_IN)}) nor a file that can be read: {error.strerror}"
    except JsonError as error:
        problem = str(error)
    raise _bad(text, problem)


def _texts(field: str, value: Any, most: int, max_chars: int) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > most:
        raise _bad(field, f"must be a list of at most {most} texts")
    if not all(isinstance(text, str) and 0 < len(text) <= max_chars for text in value):
        raise _bad(field, f"must have texts of 1 to {max_chars} characters")
    return tuple(dict.fromkeys(value))


def _bad(field: str, problem: str) -> AdapterError:
    return AdapterError(ErrorCode.BAD_PROFILE, f"profile: {printable(field)} {problem}", field)
