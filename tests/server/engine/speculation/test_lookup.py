"""Where a text repeats itself: against a search that looks at everything."""

from itertools import pairwise
from random import Random

import pytest

from guanaco.server.engine.speculation.lookup import MOST_AT_ONCE, Lookup
from guanaco.server.engine.speculation.suffix import SuffixLookup


def test_a_copy_is_foretold_from_its_second_token_on() -> None:
    lookup, text = Lookup(), [5, 6, 7, 8, 9, 10, 11]
    lookup.follow([*text, 1, 5], 7)
    assert lookup.draft([*text, 1, 5], 4) == []
    copied = [*text, 1, 5, 6]
    lookup.follow(copied, 7)
    assert lookup.length == 2
    assert lookup.draft(copied, 4) == [7, 8, 9, 10]
    copied += [7, 8]
    assert lookup.follow(copied, 7) == [(2, True), (3, True)]
    assert lookup.draft(copied, 3) == [9, 10, 11]
    assert lookup.length == 4


def test_a_wrong_token_ends_a_source_and_another_is_found() -> None:
    text = [1, 2, 3, 4, 20, 3, 9, 1, 2, 3]
    lookup = Lookup()
    lookup.follow(text, 0)
    assert lookup.draft(text, 1) == [4]
    text += [9]  # 4 was foretold; the text 3, 9 occurs earlier, too
    assert lookup.follow(text, 0)[-1] == (3, False)
    assert lookup.draft(text, 2) == [1, 2]


def test_a_repetition_goes_on() -> None:
    text = [9, 1, 2, 1, 2]
    lookup = Lookup()
    lookup.follow(text, 0)
    assert lookup.draft(text, 5) == [1, 2, 1, 2, 1]


def test_tokens_of_the_prompt_are_not_judged() -> None:
    text = [1, 2, 3] * 5
    assert Lookup().follow(text, len(text)) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_source_is_a_place_that_reads_the_same(seed: int) -> None:
    """In random texts over few tokens, token by token: where a pair of tokens occurred before, there is a source; all
    that it claims is true."""
    random, lookup, text = Random(seed), Lookup(), []
    for _ in range(400):
        text.append(random.choice((1, 2, 3, 4, 2**20)))
        lookup.follow(text, 0)
        pairs = list(pairwise(text))
        assert (lookup.source is not None) >= (pairs[-1:] != [] and pairs[-1] in pairs[:-1])
        if lookup.source is not None:
            assert lookup.length >= 2
            assert lookup.source < len(text)
            assert text[lookup.source - lookup.length : lookup.source] == text[-lookup.length :]
            assert lookup.draft(text, 3)[: len(text) - lookup.source] == text[lookup.source :][:3]


@pytest.mark.parametrize("kind", [Lookup, SuffixLookup])
def test_a_long_prompt_is_entered_over_several_steps(kind: type[Lookup | SuffixLookup]) -> None:
    """No step waits for all of it, and nothing is drafted from a part of it."""
    prompt, lookup = list(range(3 * MOST_AT_ONCE)), kind()
    text = [*prompt, 5, 6, 7]
    for number in range(1, 4):
        lookup.follow(text, len(prompt))
        assert lookup.num_seen == number * MOST_AT_ONCE
        assert lookup.draft(text, 3) == []
    lookup.follow(text, len(prompt))
    assert lookup.draft(text, 3) == [8, 9, 10]
