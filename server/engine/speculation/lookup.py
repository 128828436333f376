"""Guesses how a text goes on from an earlier place of it that reads like its end ("prompt lookup").

Follows the tokens of one request, prompt and output. Its *source* is the index after an earlier occurrence of the
latest tokens: the token there is the guess for the next one. The source moves on with each token that it predicted. So
`follow` also tells how often such guesses were right, without computing a draft. Knows no models and no steps. Used by
`speculator`.
"""

from collections.abc import Sequence

# Equal tokens that make an earlier place a source. Longer matches are tried first: they are right more often.
_LONG, _SHORT = 4, 2
_MOST_COMPARED = 32  # most tokens that the length of a match counts
_SHIFT = 24  # token ids are below 2 ** 24
# Tokens that one call looks at: a long prompt is entered over several steps, so that no step waits for all of it.
MOST_AT_ONCE = 4096


class Lookup:
    """The source of one text, and the earlier places of its n-grams."""

    def __init__(self) -> None:
        self.num_seen = 0  # tokens that `follow` has read
        self.source: int | None = None  # the index of the guess for the next token; None: no guess
        self.length = 0  # tokens before the source that equal the text's end, as far as they were compared
        self._after: tuple[dict[int, int], dict[int, int]] = {}, {}  # n-gram → the index after its latest place

    def follow(self, token_ids: Sequence[int], start: int) -> list[tuple[int, bool]]:
        """Read the new tokens. Returns (the match's length, whether the guess was right) for each new token that had a
        guess. Tokens before index `start` are left out: they were not sampled. One call reads MOST_AT_ONCE tokens at
        most; until all are read, there is no draft."""
        found = []
        end = min(len(token_ids), self.num_seen + MOST_AT_ONCE)
        for index in range(self.num_seen, end):
            if self.source is not None:
                is_right = token_ids[self.source] == token_ids[index]
                if index >= start:
                    found.append((self.length, is_right))
                self.source, self.length = (self.source + 1, self.length + 1) if is_right else (None, 0)
            self._enter(token_ids, index + 1, is_wanted=self.source is None and index + 1 >= start)
        self.num_seen = end
        return found

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """`most` tokens: those from the source on, repeated from there at the text's end ("abab" → "abab…"). Empty
        without a source, or while tokens are still to be read."""
        if self.source is None or self.num_seen < len(token_ids):
            return []
        period = len(token_ids) - self.source
        known = token_ids[self.source : self.source + most]
        return [known[i % period] for i in range(most)]

    def _enter(self, token_ids: Sequence[int], end: int, *, is_wanted: bool) -> None:
        """Remember the n-grams that end before index `end`. is_wanted: first look for a source for this end."""
        for size, after in zip((_LONG, _SHORT), self._after, strict=True):
            if end < size:
                continue
            key = 0
            for token in token_ids[end - size : end]:
                key = key << _SHIFT | token
            if is_wanted and self.source is None and (source := after.get(key)) is not None:
                self.source, self.length = source, _equal_before(token_ids, source, end, size)
            after[key] = end


def _equal_before(token_ids: Sequence[int], source: int, end: int, known: int) -> int:
    """How many tokens before `source` equal those before `end`: at least `known`, counted up to _MOST_COMPARED."""
    length = known
    most = min(source, _MOST_COMPARED)
    while length < most and token_ids[source - 1 - length] == token_ids[end - 1 - length]:
        length += 1
    return length
