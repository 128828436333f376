"""What a request's stop strings are to the engine: control tokens that end it, and texts that are searched for.

Knows no HTTP and no model. Called by the API and by `guanaco generate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class ControlTokens(Protocol):
    """What is asked of a tokenizer here: which texts are control tokens."""

    def control_id(self, text: str) -> int | None: ...
    def holds_control(self, text: str) -> bool: ...


@dataclass(frozen=True)
class Stops:
    """The stop strings of one request.

    An answer leaves control tokens out, so a stop string with one would never be found in it. One that is a control
    token is a stop token, too; where one has other text besides, the search has to see control tokens.
    """

    strings: tuple[str, ...]
    tokens: tuple[tuple[int, str], ...]  # (id, stop string) of those that are control tokens
    see_control: bool

    @classmethod
    def of(cls, strings: Iterable[str], tokenizer: ControlTokens) -> "Stops":
        unique = tuple(dict.fromkeys(strings))
        tokens = tuple((token, text) for text in unique if (token := tokenizer.control_id(text)) is not None)
        named = {text for _, text in tokens}
        return cls(unique, tokens, any(text not in named and tokenizer.holds_control(text) for text in unique))

    @property
    def token_ids(self) -> frozenset[int]:
        return frozenset(token for token, _ in self.tokens)
