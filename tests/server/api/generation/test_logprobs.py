"""Log-probabilities as answers show them, where tokens are no whole characters, look alike, or are impossible."""

import json

from guanaco.server.api.generation.logprobs import CompletionLogprobs, chat_logprobs
from guanaco.server.engine.request import TokenLogprob
from support.server.fake_engine import BOS, FakeTokenizer

TOKENIZER = FakeTokenizer()


def completion(*logprobs: TokenLogprob | None, skip: bool = True) -> dict:
    return CompletionLogprobs(TOKENIZER, skip_special_tokens=skip).chunk(logprobs, first_token=BOS)


def test_tokens_that_look_alike_keep_the_likelier_value() -> None:
    """Parts of characters all read U+FFFD. lm-eval takes a token for the greedy choice if it has the largest value."""
    likely, unlikely = 0xE2, 0xE3
    top = ((likely, -0.25), (unlikely, -1.5))
    greedy = completion(TokenLogprob(likely, -0.25, top))
    assert greedy["top_logprobs"] == [{"\ufffd": -0.25}]
    assert greedy["token_logprobs"] == [-0.25]
    not_greedy = completion(TokenLogprob(unlikely, -1.5, top))
    assert not_greedy["token_logprobs"][0] < max(not_greedy["top_logprobs"][0].values())


def test_a_token_outside_of_the_top_is_shown_with_it() -> None:
    shown = completion(TokenLogprob(ord("z"), -7.0, ((ord("a"), -0.125),)))
    assert shown["top_logprobs"] == [{"a": -0.125, "z": -7.0}]


def test_impossible_tokens_have_a_number() -> None:
    minus_infinity = float("-inf")
    item = TokenLogprob(ord("z"), minus_infinity, ((ord("a"), 0.0), (ord("b"), minus_infinity)))
    for answer in (completion(item), chat_logprobs(TOKENIZER, [item])):
        json.dumps(answer, allow_nan=False)
    assert completion(item)["token_logprobs"] == [-9999.0]


def test_offsets_count_characters_not_tokens() -> None:
    items = [TokenLogprob(byte, -1.0, ()) for byte in "a€b".encode()]
    assert completion(*items)["text_offset"] == [0, 1, 1, 1, 2]
    assert completion(None, *items)["text_offset"] == [0, 0, 1, 1, 1, 2]
    assert completion(None, *items, skip=False)["text_offset"] == [0, 5, 6, 6, 6, 7]


def test_offsets_run_on_from_chunk_to_chunk() -> None:
    maker = CompletionLogprobs(TOKENIZER, skip_special_tokens=True)
    items = [TokenLogprob(byte, -1.0, ()) for byte in "a€b".encode()]
    chunks = [maker.chunk(items[:2]), maker.chunk([]), maker.chunk(items[2:])]
    assert [offset for chunk in chunks for offset in chunk["text_offset"]] == [0, 1, 1, 1, 2]


def test_chat_shows_the_bytes_of_a_token() -> None:
    entry = chat_logprobs(TOKENIZER, [TokenLogprob(0xE2, -0.5, ((0xE2, -0.5),))])["content"][0]
    assert entry == {
        "token": "\ufffd",
        "logprob": -0.5,
        "bytes": [0xE2],
        "top_logprobs": [{"token": "\ufffd", "logprob": -0.5, "bytes": [0xE2]}],
    }
