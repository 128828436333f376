"""What ends a request: its stop strings, as control tokens and as texts that are searched for, and its last token.

Knows no HTTP and no model. Called by the API and by `guanaco generate`, and by the scheduler for every token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.request import FinishReason, Sequence


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


@dataclass(frozen=True)
class End:
    """Why a request ends with the token that was drawn last."""

    reason: FinishReason
    stop_reason: int | None = None  # the stop token
    error: ErrorCode | None = None
    is_in_text: bool = False  # that token is text, and no mark of the end


def end_of(sequence: Sequence, token_id: int, eos_ids: frozenset[int], max_model_len: int) -> End | None:
    """The end that a drawn token makes, None where the request goes on. Its constraint takes the token in here, once.

    A constraint that is complete ends the request as an eos would, before min_tokens too: nothing else can come.
    """
    params, num_output_tokens = sequence.request.params, sequence.num_output_tokens
    if num_output_tokens >= params.min_tokens:
        if token_id in params.stop_token_ids:
            return End(FinishReason.STOP, token_id)
        if token_id in eos_ids and not params.ignore_eos:
            return End(FinishReason.STOP)
    if (constraint := sequence.request.constraint) is not None:
        if constraint.is_end(token_id):
            return End(FinishReason.STOP)
        constraint.accept(token_id)
        if constraint.error is not None:
            return End(FinishReason.ERROR, error=constraint.error)
        if constraint.is_complete:
            return End(FinishReason.STOP, is_in_text=True)
    if num_output_tokens >= params.max_tokens or sequence.num_tokens >= max_model_len:
        return End(FinishReason.LENGTH)
    return None
