"""Accepts draft tokens up to the first that differs from its sampled token. Called by the model runner."""

from collections.abc import Iterator
from dataclasses import replace

from guanaco.server.engine.request import SampledToken


def verified(draft: tuple[int, ...], drawn: Iterator[SampledToken]) -> SampledToken:
    """The first of a sequence's sampled tokens; `more` has the tokens after it, as far as the draft was right.

    drawn: the sampled token of each row; len(draft) + 1 of them are consumed. A row after a wrong draft token was
    computed from this wrong token, so its sampled token (or error) is dropped. A row that failed after a right token is
    dropped, too: the next step computes it again as its first row, and only an error there ends the request.
    """
    rows = [next(drawn) for _ in range(len(draft) + 1)]
    num_right = 0
    while num_right < len(draft) and rows[num_right].token_id == draft[num_right]:
        if rows[num_right + 1].error is not None:
            break
        num_right += 1
    return replace(rows[0], more=tuple(rows[1 : num_right + 1])) if num_right else rows[0]
