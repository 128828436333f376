"""Which draft tokens stay: those that equal what was sampled in their place. Called by the model runner."""

from collections.abc import Iterator
from dataclasses import replace

from guanaco.server.engine.request import SampledToken


def verified(draft: tuple[int, ...], drawn: Iterator[SampledToken]) -> SampledToken:
    """The first of a sequence's drawn tokens, with those after it in `more`, as far as the draft was right.

    drawn: the token of each row, len(draft) + 1 of them, which are taken. A row after a wrong draft token was computed
    from that token, so its own token (or error) means nothing and is left out.
    """
    rows = [next(drawn) for _ in range(len(draft) + 1)]
    num_right = 0
    while num_right < len(draft) and rows[num_right].error is None and rows[num_right].token_id == draft[num_right]:
        num_right += 1
    return replace(rows[0], more=tuple(rows[1 : num_right + 1])) if num_right else rows[0]
