"""Where a text repeats itself: the continuation of an earlier place that reads like its end ("prompt lookup").

Follows one request's tokens, prompt and output. It stands at a *source*, the place after an earlier occurrence of the
latest tokens, and moves on with each token that the source foretold. So it also knows how often such places were right,
without a draft ever being computed. No knowledge of models or steps. Used by `speculator`.
"""

from collections.abc import Sequence

# An earlier place counts from this many equal tokens on. Longer ones are looked for first: they are right more often.
_LONG, _SHORT = 4, 2
_MOST_COMPARED = 32  # how far a match is measured backwards
_SHIFT = 24  # token ids are below 2 ** 24


class Lookup:
    """The source of one text, and the earlier places of its n-grams."""

    def __init__(self) -> None:
        self.num_seen = 0  # tokens that were looked at
        self.source: int | None = None  # the index that foretells the next token; None: nothing does
        self.length = 0  # how many tokens before the source equal the text's end, as far as that was measured
        self._after: tuple[dict[int, int], dict[int, int]] = {}, {}  # n-gram → the index after its latest place

    def follow(self, token_ids: Sequence[int], start: int) -> list[tuple[int, bool]]:
        """Look at the tokens that are new. Returns for each of them that a source foretold (the match's length, whether
        it was right), but nothing for tokens before index `start`: those were not sampled."""
        found = []
        for index in range(self.num_seen, len(token_ids)):
            if self.source is not None:
                is_right = token_ids[self.source] == token_ids[index]
                if index >= start:
                    found.append((self.length, is_right))
                self.source, self.length = (self.source + 1, self.length + 1) if is_right else (None, 0)
            self._enter(token_ids, index + 1, is_wanted=self.source is None and index + 1 >= start)
        self.num_seen = len(token_ids)
        return found

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """What the source foretells, at most `most` tokens. A source near the end repeats: "abab" goes on "abab"."""
        if self.source is None:
            return []
        period = len(token_ids) - self.source
        known = token_ids[self.source : self.source + most]
        return [known[i % period] for i in range(most)]

    def _enter(self, token_ids: Sequence[int], end: int, *, is_wanted: bool) -> None:
        """Remember the n-grams that end before index `end`. is_wanted: first look for the source there."""
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
    """How many tokens before `source` and before `end` are the same; `known` of them are."""
    length = known
    most = min(source, _MOST_COMPARED)
    while length < most and token_ids[source - 1 - length] == token_ids[end - 1 - length]:
        length += 1
    return length
