"""Streaming text: however tokens are cut, what is shown adds up to the text, and a stop string is never seen."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.engine.detokenizer import REPLACEMENT, Detokenizer
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.stops import Stops
from support.models.hard_strings import HARD_STRINGS
from support.models.tiny_tokenizers import write_byte_level, write_sentencepiece_like
from support.server.fake_engine import END, USER, FakeTokenizer


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    write = write_byte_level if request.param == "bytes" else write_sentencepiece_like
    path = tmp_path_factory.mktemp("tokenizer")
    write(path)
    return Tokenizer.from_directory(path)


class Bytes:
    """The worst tokenizer: every byte is a token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")


def params(**fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=1000, **fields)  # type: ignore[arg-type]


def pieces_of(detokenizer: Detokenizer, ids: list[int], cuts: list[int] | None = None) -> list[str]:
    """What is shown after each group of tokens, the last call being the one that says there are no more."""
    pieces = []
    edges = sorted({0, *(cuts if cuts is not None else range(len(ids))), len(ids)})
    for start, stop in pairwise(edges):
        pieces.append(detokenizer.append(ids[start:stop], finished=stop == len(ids)))
        if detokenizer.stop_reason is not None:
            break
    return pieces


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    prompt, ids = tokenizer.encode("So: "), tokenizer.encode(text, add_bos=False)
    if not ids:
        return
    pieces = pieces_of(Detokenizer(tokenizer, params(), prompt), ids)
    whole = tokenizer.decode(prompt + ids)
    assert tokenizer.decode(prompt) + "".join(pieces) == whole
    if REPLACEMENT not in whole:
        assert not any(REPLACEMENT in piece for piece in pieces), "half a character was shown"


def test_a_character_appears_with_its_last_byte() -> None:
    pieces = pieces_of(Detokenizer(Bytes(), params()), list("aé👩‍🚀z".encode()))
    assert [piece for piece in pieces if piece] == list("aé👩‍🚀z")


def test_bytes_that_never_become_a_character_are_shown_in_the_end() -> None:
    assert pieces_of(Detokenizer(Bytes(), params()), [97, 0xF0, 0x9F])[-1] == REPLACEMENT
    pieces = pieces_of(Detokenizer(Bytes(), params()), [97, 0xF0, 0x9F, *b"bcd"])
    assert "".join(pieces) == f"a{REPLACEMENT}bcd"


@given(
    text=st.text(alphabet="ab é🦙", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="ab é🦙", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 120)),
    include=st.booleans(),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_stop_strings_under_any_cut(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    ids = list(text.encode())
    detokenizer = Detokenizer(Bytes(), params(stop_strings=tuple(stops), include_stop_str=include))
    pieces = pieces_of(detokenizer, ids, [cut for cut in cuts if cut < len(ids)])
    shown = "".join(pieces)
    # The first match is the one that is complete first, token by token; of those that then begin first, the longest.
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(stop), -len(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            start, _, stop = min(found)
            assert detokenizer.stop_reason == stop
            assert shown == text[: start + len(stop) * include]
            return
    assert detokenizer.stop_reason is None
    assert shown == text


def test_nothing_of_a_stop_string_is_shown_while_it_may_still_come() -> None:
    detokenizer = Detokenizer(Bytes(), params(stop_strings=("### Human:",)))
    shown = [detokenizer.append([token]) for token in b"yes ### Hum"]
    assert "".join(shown) == "yes "
    assert "".join(detokenizer.append([token]) for token in b"ble") == "### Humble"
    assert "".join(detokenizer.append([token]) for token in b" ### Human:") == " "
    assert detokenizer.stop_reason == "### Human:"


def test_text_held_for_a_stop_string_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(Bytes(), params(stop_strings=("END",)))
    assert detokenizer.append(list(b"the EN")) == "the "
    assert detokenizer.append([], finished=True) == "EN"


def test_min_tokens_lets_a_stop_string_pass() -> None:
    detokenizer = Detokenizer(Bytes(), params(stop_strings=("a",), min_tokens=4))
    shown = ""
    for token in b"bababab":
        shown += detokenizer.append([token])
        if detokenizer.stop_reason is not None:
            break
    assert detokenizer.stop_reason == "a"
    assert shown == "bab", "the first a may pass, the second is the fourth token"


def test_special_tokens_are_text_only_when_asked_for(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    special = min(tokenizer.special_ids)
    ids = [*tokenizer.encode("a", add_bos=False), special, *tokenizer.encode("b", add_bos=False)]
    assert "".join(pieces_of(Detokenizer(tokenizer, params()), ids)) == "ab"
    shown = "".join(pieces_of(Detokenizer(tokenizer, params(skip_special_tokens=False)), ids))
    assert shown == f"a{tokenizer.token_text(special)}b"


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    """Windows move on: what is decoded at once stays short, even for a text that is one long line without spaces."""
    longest = 0

    class Counting(Bytes):
        def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return super().decode(ids)

    pieces_of(Detokenizer(Counting(), params()), list(b"x" * 500 + "é🦙".encode() * 100))
    assert longest < 100


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("ids", "stop", "shown", "stopped"),
    [
        ([*b"hi\n", USER, *b"xy"], "\n<user>x", "hi", "\n<user>x"),
        ([*b"hi", END, *b"\n"], "<end>\n", "hi", "<end>\n"),
        ([*b"a", END, *b"b", USER, *b"c"], "<end>\n", "abc", None),  # other control tokens stay out of the text
        ([*b"a\n", USER, *b"b"], "\n<user>x", "a\nb", None),  # held back, and it was not the stop string
        ([*b"a<end>\nb"], "<end>\n", "a", "<end>\n"),  # in letters
    ],
)
def test_stop_strings_with_a_control_token_and_other_text(
    ids: list[int], stop: str, shown: str, stopped: str | None, include: bool
) -> None:
    stops = Stops.of([stop], FakeTokenizer())
    fields = {"stop_strings": stops.strings, "stops_see_control": stops.see_control, "include_stop_str": include}
    detokenizer = Detokenizer(FakeTokenizer(), params(**fields))
    text = ""
    for number, token in enumerate(ids):
        text += detokenizer.append([token], finished=number == len(ids) - 1)
        if detokenizer.stop_reason:
            break
    assert detokenizer.stop_reason == stopped
    assert text == shown + (stopped or "") * include


def test_hidden_control_tokens_are_no_text_where_others_are_shown() -> None:
    """A call's marker is shown, the markers of turns are not; stop strings see both."""
    tokenizer, ids = FakeTokenizer(), [*b"a", USER, *b"b", END, *b"c"]
    shown = {"skip_special_tokens": False, "hidden_token_ids": frozenset({END})}
    assert "".join(pieces_of(Detokenizer(tokenizer, params(**shown)), ids)) == "a<user>bc"
    stops = Stops.of(["b<end>"], tokenizer)
    fields = {"stop_strings": stops.strings, "stops_see_control": stops.see_control, **shown}
    detokenizer = Detokenizer(tokenizer, params(**fields))
    assert "".join(pieces_of(detokenizer, ids)) == "a<user>"
    assert detokenizer.stop_reason == "b<end>"
