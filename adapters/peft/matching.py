"""Finds the modules that the entries of an adapter_config.json mean, and the entries that match no module.

Matching follows PEFT 0.21 (`tuners_utils.check_target_module_exists`, `utils.other.get_pattern_key`). Knows module
names, not config fields. Called by `config`.
"""

import re
from collections.abc import Callable
from typing import Generic, TypeVar

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.patterns import Budget, Matcher, PatternError
from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.shown import printable

# Modules that this server never adapts: an adapter that excludes them gets what it asks for. Every architecture's norms
# are among them, since an author may use one list for several bases.
_NEVER_ADAPTED = (
    *("lm_head", "model.embed_tokens", "model.norm", "model.layers.0.self_attn", "model.layers.0.mlp"),
    *("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"),
    *("model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm"),
)
_MAX_SHOWN = 5  # entries listed in one note
_IN_LAYER = re.compile(r"(?P<list>.*?\.[^.]*)\.(?P<index>\d+)\.")
# A pattern that is a plain name, with at most anchors and escaped dots: matching it never needs backtracking.
_PLAIN = re.compile(r"(?P<anchor>\^?)(?P<name>(?:[A-Za-z0-9_.-]|\\\.)+)\$?")

Value = TypeVar("Value", bound=float)


class Resolved(dict[str, tuple[int, float]]):
    """{targeted module: (rank, scale)}. `notes` name the config's entries that had no effect, for the operator."""

    notes: tuple[str, ...] = ()


def in_layer(name: str) -> re.Match[str] | None:
    """A match with the layer list's name (`list`) and the layer's number (`index`); None for a module outside of
    layers."""
    return _IN_LAYER.match(name)


def matcher(names: tuple[str, ...] | str, field: str, budget: Budget) -> Callable[[str], bool]:
    """A function that says whether the field means a module. names: a pattern for the module's whole name, or a list:
    the module's name must equal an entry, or end with a dot and an entry."""
    if isinstance(names, str):
        if names.lower() == "all-linear":
            return lambda _: True
        return _pattern(names, field, budget) if names else lambda _: False
    exact, endings = frozenset(names), tuple(f".{name}" for name in names)
    return lambda name: name in exact or name.endswith(endings)


class Table(Generic[Value]):
    """`rank_pattern` or `alpha_pattern`: the first key that matches a module gives its value.

    PEFT matches `(.*\\.)?(KEY)$` from the start of the name. Most keys are plain names; there may be hundreds.
    """

    def __init__(self, items: tuple[tuple[str, Value], ...], field: str, default: Value, budget: Budget) -> None:
        self._default = default
        self._items = [(key, _plain(key) or _pattern(rf"(.*\.)?({key})", field, budget), value) for key, value in items]
        self._used: set[str] = set()

    def get(self, name: str) -> Value:
        """The value for a module; the default if no key matches."""
        for key, matches, value in self._items:
            if matches(name):
                self._used.add(key)
                return value
        return self._default

    def unused(self) -> list[str]:
        """The keys that were never the first match of a module."""
        return [key for key, _, _ in self._items if key not in self._used]


def matching_nothing(entries: tuple[str, ...] | str, names: list[str]) -> list[str]:
    """The entries of a list of module names that no module equals or ends with. A pattern is not checked here."""
    if isinstance(entries, str):
        return []
    endings = {".".join(parts[start:]) for parts in (name.split(".") for name in names) for start in range(len(parts))}
    return [entry for entry in entries if entry not in endings]


def excluding_nothing(entries: tuple[str, ...] | str, names: list[str], excluded: Callable[[str], bool]) -> list[str]:
    """The entries of `exclude_modules` that match no module. Modules that are never adapted are valid entries, too."""
    everything = [*names, *_NEVER_ADAPTED]
    if isinstance(entries, str):
        return [entries] if entries and not any(map(excluded, everything)) else []
    return matching_nothing(entries, everything)


def no_effect(field: str, entries: list[str]) -> str:
    """A note about entries of a field that change nothing."""
    shown = ", ".join(map(printable, entries[:_MAX_SHOWN])) + (", ..." if len(entries) > _MAX_SHOWN else "")
    return f"{field} has entries without an effect on this base: {shown}; check their spelling and the adapter's base"


def _plain(key: str) -> Callable[[str], bool] | None:
    match = _PLAIN.fullmatch(key)
    if match is None:
        return None
    ending = re.compile(match["name"])
    length, anchored = len(match["name"].replace("\\", "")), bool(match["anchor"])

    def matches(name: str) -> bool:
        rest = len(name) - length
        if rest and (rest < 0 or anchored or name[rest - 1] != "."):
            return False
        return ending.fullmatch(name, rest) is not None

    return matches


def _pattern(text: str, field: str, budget: Budget) -> Callable[[str], bool]:
    def refuse(error: PatternError) -> AdapterError:
        problem = f"{field} has a pattern that {error}: {printable(text)}; name the modules instead"
        return AdapterError(ErrorCode.PATTERN_UNSUPPORTED, problem, field)

    try:
        matcher = Matcher(text, budget)
    except PatternError as error:
        raise refuse(error) from None

    def matches(name: str) -> bool:
        try:
            return matcher.fullmatch(name)
        except PatternError as error:
            raise refuse(error) from None

    return matches
