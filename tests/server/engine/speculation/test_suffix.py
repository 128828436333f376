"""Suffix drafts: the longest match and the most votes; past answers only of the same tenant and adapters."""

import tracemalloc
from random import Random

import pytest

from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Sequence
from guanaco.server.engine.speculation.costs import StepCosts
from guanaco.server.engine.speculation.speculator import Speculator, Wish
from guanaco.server.engine.speculation.suffix import BYTES_PER_TOKEN, PastAnswers, SuffixLookup, TextIndex

CHEAP_ROWS = StepCosts([(1, 1.0), (100, 1.5)])
ANSWER = Random(5).sample(range(1000), 60)


def test_the_longest_match_wins() -> None:
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 1, 2, 3, 4]
    lookup = SuffixLookup()
    lookup.follow(text, 0)
    assert lookup.draft(text, 3) == [50, 9, 2], "not the latest place, which reads the same for three tokens only"
    assert lookup.length == 4


def test_among_equal_matches_the_most_votes_win() -> None:
    text = [1, 2, 3, 50, 7, 1, 2, 3, 60, 8, 1, 2, 3, 60, 9, 1, 2, 3, 70, 4, 1, 2, 3]
    lookup = SuffixLookup()
    lookup.follow(text, 0)
    assert lookup.draft(text, 2) == [60, 9]


@pytest.mark.parametrize("seed", range(4))
def test_the_source_reads_the_same(seed: int) -> None:
    random, lookup, text, right = Random(seed), SuffixLookup(), [], 0
    for _ in range(300):
        text.append(random.choice((1, 2, 3)))
        right += sum(is_right for _, is_right in lookup.follow(text, 0))
        triples = [tuple(text[i : i + 3]) for i in range(len(text) - 2)]
        assert bool(lookup.draft(text, 1)) >= (triples[-1:] != [] and triples[-1] in triples[:-1])
    assert right > 50


def sequence_of(number: int, output: list[int], *, salt: str = "", version: str = "", scale: float = 1.0) -> Sequence:
    loras = (LoraRef(version, scale),) if version else ()
    params = SamplingParams(max_tokens=200)
    request = Request(f"r{number}", (7, 7), params, loras, cache_salt=salt)
    return Sequence(request, [7, 7, *output], arrival_number=number)


def draft_of(speculator: Speculator, sequence: Sequence) -> tuple[int, ...]:
    (draft,) = speculator.drafts([Wish(sequence, 15)], 1, 0)
    speculator.forget(sequence)
    return draft


def test_past_answers_are_drafted_for_the_same_key_and_version_only() -> None:
    speculator = Speculator(CHEAP_ROWS, weighs_places=True, past=PastAnswers(1 << 20))
    first = sequence_of(0, ANSWER, salt="key", version="v1")
    assert draft_of(speculator, first) == ()
    begun = ANSWER[:10]
    assert draft_of(speculator, sequence_of(1, begun, salt="key", version="v1"))[:5] == tuple(ANSWER[10:15])
    others = ({"salt": "other", "version": "v1"}, {"salt": "key", "version": "v2"}, {"salt": "key"}, {"version": "v1"})
    for number, other in enumerate(({"salt": "key", "version": "v1", "scale": 0.5}, *others), start=2):
        assert draft_of(speculator, sequence_of(number, begun, **other)) == (), other


def test_answers_are_kept_only_where_that_was_asked_for() -> None:
    speculator = Speculator(CHEAP_ROWS, weighs_places=True)
    draft_of(speculator, sequence_of(0, ANSWER))
    assert draft_of(speculator, sequence_of(1, ANSWER[:10])) == ()
    past = PastAnswers(1 << 20)
    speculator = Speculator(CHEAP_ROWS, weighs_places=True, past=past)
    request = Request("r", (7,), SamplingParams(max_tokens=99, speculation=False))
    speculator.forget(Sequence(request, [7, *ANSWER]))
    assert past.num_tokens == 0, "a request without speculation is not remembered either"


def test_memory_is_limited_and_shared() -> None:
    """A key that writes much drops its own older answers; with many keys, the one used the longest ago goes."""
    past, random = PastAnswers(4000 * BYTES_PER_TOKEN), Random(1)
    past.add("quiet", ANSWER)
    for _ in range(200):
        past.add("busy", [random.randrange(1000) for _ in range(90)])
        assert past.num_tokens <= 1000 + len(ANSWER)
    assert past.of("quiet")
    for number in range(80):
        past.add(f"key {number}", ANSWER + ANSWER)
        past.of("quiet")
        assert past.num_tokens <= 4000
    assert past.of("quiet")
    assert not past.of("key 0")
    assert past.of("key 79")
    names = ("quiet", "busy", *(f"key {number}" for number in range(80)))
    assert past.num_tokens == sum(index.num_tokens for name in names for index in past.of(name))
    assert PastAnswers(100).add("key", ANSWER) is None, "too little memory keeps nothing"


def test_an_index_takes_no_more_memory_than_is_counted() -> None:
    """Random tokens are the worst case: no n-gram occurs twice."""
    text = Random(3).choices(range(32_000), k=8000)
    tracemalloc.start()
    try:
        index = TextIndex()
        for end in range(1, len(text) + 1):
            index.add(text, end)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < index.num_tokens * BYTES_PER_TOKEN
