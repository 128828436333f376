"""What ends a request: stop strings, which are searched for in the text or become stop tokens, or its latest token.

Knows no HTTP and no model. The API and `guanaco generate` call `Stops.of`; the scheduler calls `end_of` for every
sampled token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from guanaco.models.error_codes import ErrorCode
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.request import FinishReason, SampledToken, Sequence, TokenOutput


@dataclass(frozen=True)
class Stops:
    """The stop strings of one request.

    Control tokens are left out of an answer, so a stop string that holds one would never be found in it. A stop string
    that is a control token becomes a stop token, too. If one holds a control token and other text, control tokens must
    stay in the text that is searched (`see_control`).
    """

    strings: tuple[str, ...]
    tokens: tuple[tuple[int, str], ...]  # (token id, stop string) of the stop strings that are control tokens
    see_control: bool

    @classmethod
    def of(cls, strings: Iterable[str], tokenizer: Tokenizer) -> "Stops":
        unique = tuple(dict.fromkeys(strings))
        tokens = tuple((token, text) for text in unique if (token := tokenizer.control_id(text)) is not None)
        named = {text for _, text in tokens}
        return cls(unique, tokens, any(text not in named and tokenizer.holds_control(text) for text in unique))

    @property
    def token_ids(self) -> frozenset[int]:
        return frozenset(token for token, _ in self.tokens)


@dataclass(frozen=True)
class End:
    """Why a request ends with its latest token."""

    reason: FinishReason
    stop_reason: int | None = None  # the stop token's id
    error: ErrorCode | None = None
    is_in_text: bool = False  # the latest token belongs to the text: it is no eos and no stop token


def end_of(sequence: Sequence, token_id: int, eos_ids: frozenset[int], max_model_len: int) -> End | None:
    """How a request ends with its sampled token; None if it goes on. Moves the request's constraint on by the token, so
    it must be called once per token.

    A complete constraint ends the request as an eos would, even before min_tokens: no token can follow.
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


def output_of(sequence: Sequence, token: SampledToken, end: End | None) -> TokenOutput:
    """The output of a request for its sampled token. end: the result of `end_of` for this token."""
    return TokenOutput(
        sequence.request.request_id,
        () if token.token_id is None else (token.token_id,),
        () if token.logprob is None else (token.logprob,),
        token.prompt_logprobs,
        None if end is None else end.reason,
        None if end is None else end.stop_reason,
        error=None if end is None else end.error,
        num_cached_tokens=sequence.num_cached_tokens,
        queue_seconds=sequence.queue_seconds,
        logits=token.logits,
        ends_in_text=end is not None and end.is_in_text,
    )
