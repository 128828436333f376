"""A regular expression for many tokens that looks at each character once, however many tokens begin alike.

A plain list of alternatives tries every token at every character: a text of 131 kB and some thousand tokens of a
model's would hold the interpreter for seconds. Called by `tokenizer`.
"""

import re
from collections.abc import Iterable

from guanaco.models.errors import ModelError


def longest_match_pattern(tokens: Iterable[str]) -> str:
    """The source of an expression that matches the longest of `tokens` at a place; of none, it matches nowhere.

    Raises ModelError for tokens that continue each other hundreds of times, as no model's do.
    """
    try:
        pattern = _pattern_of(set(filter(None, tokens)))
        re.compile(pattern)
    except RecursionError:
        raise ModelError(
            "the tokenizer has control tokens that begin with each other too often: get it elsewhere"
        ) from None
    return pattern


def _pattern_of(tokens: set[str]) -> str:
    if not tokens:
        return "(?!)"
    if len(tokens) == 1:
        return re.escape(next(iter(tokens)))
    first, last = min(tokens), max(tokens)  # what these two share, all share
    prefix = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    by_first: dict[str, set[str]] = {}
    for token in tokens:
        rest = token[len(prefix) :]
        by_first.setdefault(rest[:1], set()).add(rest)
    is_token_itself = by_first.pop("", None) is not None
    branches = "|".join(_pattern_of(rests) for _, rests in sorted(by_first.items()))
    return re.escape(prefix) + f"(?:{branches})" + ("?" if is_token_itself else "")
