"""The formats by name, and the choice of a format from a chat template's text."""

from collections.abc import Callable

from guanaco.server.api.tools.formats.base import CallFormat
from guanaco.server.api.tools.formats.hermes import HERMES
from guanaco.server.api.tools.formats.llama3 import LLAMA3, PYTHON_TAG
from guanaco.server.api.tools.formats.mistral import MISTRAL

FORMATS: dict[str, CallFormat] = {each.name: each for each in (HERMES, LLAMA3, MISTRAL)}
DEFAULT = HERMES
# In this order: the first text that a template has decides.
_SIGNS = (
    ("<tool_call>", HERMES),
    ("[TOOL_CALLS]", MISTRAL),
    (PYTHON_TAG, LLAMA3),
    ("<|start_header_id|>ipython", LLAMA3),
    ("'ipython'", LLAMA3),
    ('"ipython"', LLAMA3),
)


def format_of_template(source: str) -> CallFormat:
    """The format that appears in a template's text; Hermes' if none does."""
    return next((found for sign, found in _SIGNS if sign in source), DEFAULT)


def control_ids_of_calls(control_id: Callable[[str], int | None]) -> frozenset[int]:
    """The control tokens of a vocabulary that are texts of any format's calls."""
    ids = (control_id(text) for each in FORMATS.values() for text in each.control_texts)
    return frozenset(token for token in ids if token is not None)
