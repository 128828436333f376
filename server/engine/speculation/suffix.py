"""Finds how a text may go on, from several earlier places of the text and of past answers.

Like `lookup`, but it compares several places that read like the text's end. It takes the place with the longest match.
Among equal matches it takes the token that follows most of them. `PastAnswers` keeps past answers apart by namespace
(API key, adapters' versions and scales), and only those of the same namespace are searched. Used by `speculator`.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence

from guanaco.server.engine.speculation.lookup import MOST_AT_ONCE

_SIZE = 3  # tokens that an earlier place must share with the text's end
_MOST_PLACES = 6  # places of one n-gram that are kept: the latest
_MOST_COMPARED = 32  # most tokens that the length of a match counts
_SHIFT = 24  # token ids are below 2 ** 24
BYTES_PER_TOKEN = 400  # the most memory for a past answer's token with its entries in the index

Place = tuple[Sequence[int], int]  # (a text, the index after a place in it)


class TextIndex:
    """The places of n-grams in some texts."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._places: dict[int, list[Place]] = {}  # a deque takes 600 bytes more than a list

    def add(self, text: Sequence[int], end: int) -> None:
        """Add the n-gram that ends before index `end` of a text. The text may grow later, but must not change."""
        self.num_tokens += 1
        if end >= _SIZE:
            places = self._places.setdefault(_key(text, end), [])
            places.append((text, end))
            if len(places) > _MOST_PLACES:
                del places[0]

    def places(self, token_ids: Sequence[int]) -> Sequence[Place]:
        """The places after n-grams like the text's last one, the latest last."""
        return self._places.get(_key(token_ids, len(token_ids)), ()) if len(token_ids) >= _SIZE else ()


class SuffixLookup:
    """The source of the guesses for one text; has the methods of `lookup.Lookup`."""

    def __init__(self, past: Sequence[TextIndex] = ()) -> None:
        """past: indexes of past answers that may be searched too."""
        self.num_seen = 0
        self.length = 0
        self._past = past
        self._own = TextIndex()
        self._source: Place | None = None

    def follow(self, token_ids: Sequence[int], start: int) -> list[tuple[int, bool]]:
        """As `Lookup.follow`. token_ids: the same list at every call, with further tokens."""
        found = []
        end = min(len(token_ids), self.num_seen + MOST_AT_ONCE)
        for index in range(self.num_seen, end):
            if self._source is not None:
                text, place = self._source
                is_right = place < len(text) and text[place] == token_ids[index]
                if index >= start:
                    found.append((self.length, is_right))
                self._source, self.length = ((text, place + 1), self.length + 1) if is_right else (None, 0)
            if self._source is None and index + 1 == len(token_ids) >= start:
                self._search(token_ids)
            self._own.add(token_ids, index + 1)
        self.num_seen = end
        return found

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """As `Lookup.draft`. A draft from a past answer ends at the answer's end."""
        if self._source is None or self.num_seen < len(token_ids):
            return []
        text, place = self._source
        known = list(text[place : place + most])
        if text is not token_ids or not known:
            return known
        return [known[i % (len(token_ids) - place)] for i in range(most)]

    def _search(self, token_ids: Sequence[int]) -> None:
        """Take the best place: the longest match, then the token that follows most of the longest matches."""
        found: list[tuple[int, Place]] = []
        for index in (*self._past, self._own):
            for text, place in index.places(token_ids):
                if place < len(text):
                    found.append((_equal_before(text, place, token_ids), (text, place)))
        if not found:
            return
        longest = max(length for length, _ in found)
        best = [place for length, place in found if length == longest]
        votes = Counter(text[index] for text, index in best)
        token = max(votes, key=votes.__getitem__)
        self._source = next(place for place in reversed(best) if place[0][place[1]] == token)
        self.length = longest


class PastAnswers:
    """Finished answers, by namespace. A namespace has at most a quarter of the memory; beyond it, the older half of its
    answers is dropped. If all memory is used, the least recently used namespace is dropped."""

    def __init__(self, num_bytes: int) -> None:
        self._most_tokens = num_bytes // BYTES_PER_TOKEN
        self.num_tokens = 0  # of all answers that are kept
        # namespace → (older answers, newer ones)
        self._indexes: OrderedDict[Hashable, tuple[TextIndex, TextIndex]] = OrderedDict()

    def of(self, namespace: Hashable) -> Sequence[TextIndex]:
        """The indexes of a namespace's past answers."""
        if namespace in self._indexes:
            self._indexes.move_to_end(namespace)
        return self._indexes.get(namespace, ())

    def add(self, namespace: Hashable, answer: Sequence[int]) -> None:
        """Keep an answer. Only the end of an answer is kept if it would need more than an eighth of the memory."""
        half = self._most_tokens // 8
        text = tuple(answer[-half:]) if half else ()
        if len(text) < _SIZE:
            return
        old, new = self._indexes.pop(namespace, (TextIndex(), TextIndex()))
        if new.num_tokens + len(text) > half:
            self.num_tokens -= old.num_tokens
            old, new = new, TextIndex()
        for end in range(1, len(text) + 1):
            new.add(text, end)
        self.num_tokens += len(text)
        self._indexes[namespace] = (old, new)
        while self.num_tokens > self._most_tokens:
            _, dropped = self._indexes.popitem(last=False)
            self.num_tokens -= sum(index.num_tokens for index in dropped)


def _key(token_ids: Sequence[int], end: int) -> int:
    key = 0
    for token in token_ids[end - _SIZE : end]:
        key = key << _SHIFT | token
    return key


def _equal_before(text: Sequence[int], place: int, token_ids: Sequence[int]) -> int:
    """How many tokens before `place` equal the end of `token_ids`: at least _SIZE, counted up to _MOST_COMPARED."""
    length, end = _SIZE, len(token_ids)
    most = min(place, end, _MOST_COMPARED)
    while length < most and text[place - 1 - length] == token_ids[end - 1 - length]:
        length += 1
    return length
