"""Long texts are searched, counted and sent in pieces; what comes out is as if they were done at once."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from guanaco.models.text import control_tokens, template_renderer, tokenizer
from guanaco.models.text.control_tokens import ControlTokens
from guanaco.models.text.tokenizer import Tokenizer
from support.models.tiny_tokenizers import write_byte_level

TOKENS = ["<s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x", "ss>", "<<", "é🦙"]
LONG = 1_000_000


@pytest.fixture(scope="module")
def control() -> ControlTokens:
    return ControlTokens([(number, AddedToken(text, special=True)) for number, text in enumerate(TOKENS)])


def in_one(control: ControlTokens, text: str) -> tuple[str, str]:
    """What `mark` and `substitute` must give, by calls over the whole text."""
    pattern = "|".join(map(re.escape, sorted(TOKENS, key=len, reverse=True)))
    starts = [match.start() + 1 for match in re.finditer(f"(?={pattern})", text)]
    cuts = [0, *starts, len(text)]
    marked = control._mark.join(text[a:b] for a, b in itertools.pairwise(cuts))
    return marked, re.sub(pattern, lambda match: control._stand_ins[match[0]], text)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 16])
def test_pieces_change_nothing(control: ControlTokens, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control tokens and marks lie across every border of pieces."""
    monkeypatch.setattr(control_tokens, "PIECE_CHARS", size)
    parts = st.sampled_from([*TOKENS, *"<|s>x é", "<|im_", "im_end|>", "🦙"])

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(parts, max_size=8).map("".join))
    def check(text: str) -> None:
        marked, substituted = in_one(control, text)
        assert control.mark({"a": [text]}) == {"a": [marked]}
        assert control.unmark(marked) == text
        assert control.substitute(text) == substituted
        assert control.substitute(marked) == text
        assert control.is_in(text) == (marked != text)

    check()


class Watched:
    """A compiled expression that notes how much it was given in one call."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.pattern = pattern
        self.longest = 0

    def finditer(self, text: str, start: int, end: int) -> Iterator[re.Match[str]]:
        self.longest = max(self.longest, min(end, len(text)) - start)
        return self.pattern.finditer(text, start, end)


@pytest.mark.parametrize("unit", ["x", "<", "<s>", "<|im_start|"])
def test_no_call_looks_at_more_than_a_piece(unit: str, control: ControlTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, starts = Watched(control._whole), Watched(control._starts)
    monkeypatch.setattr(control, "_whole", whole)
    monkeypatch.setattr(control, "_starts", starts)
    text = unit * (LONG // len(unit))
    assert control.substitute(control.mark(text)) == text
    for watched in (whole, starts):
        assert 0 < watched.longest <= control_tokens.PIECE_CHARS + max(map(len, TOKENS))


# --- what goes to and from the process that renders ------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just('\ud83d\x00é🦙\\"' * 5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(VALUES, st.integers(1, 9))
def test_json_in_pieces_is_json(value: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_renderer, "PIECE_CHARS", size)
        assert json.loads(b"".join(template_renderer.json_pieces(value))) == value
        text = str(value)
        assert template_renderer._text_of(memoryview(text.encode("utf-8", "surrogatepass"))) == text


def test_no_piece_of_json_is_long() -> None:
    pieces = list(template_renderer.json_pieces({"messages": [{"content": "\x00" * LONG}, {"content": "x" * LONG}]}))
    assert max(map(len, pieces)) <= 6 * template_renderer.PIECE_CHARS
    assert len(pieces) > 2 * LONG // template_renderer.PIECE_CHARS


# --- how many ids are made -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(write_byte_level(tmp_path_factory.mktemp("tiny")))


def test_a_text_that_cannot_fit_is_not_encoded_to_its_end(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of ids of no more than a quarter above the most, and a piece, are made."""
    made: list[int] = []

    def watched(encoding: Any) -> list[int]:
        made.append(len(encoding))
        return list(encoding.ids)

    monkeypatch.setattr(Tokenizer, "_ids_of", staticmethod(watched))
    most = 1000
    for text in ("xyz " * (LONG // 4), "<|im_start|>" * (LONG // 12)):
        ids = tiny.encode(text, parse_control=True, max_tokens=most)
        assert len(ids) > most
        sure = len(ids) - tokenizer._PER_CUT  # a control token may be cut in two, in a text that is refused anyway
        assert ids[:sure] == tiny.encode(text, parse_control=True)[:sure]
    assert max(made[::2]) <= most + most // 4 + 2 * tokenizer._COUNTED_CHARS < made[1]


def test_a_text_that_fits_is_whole(tiny: Tokenizer) -> None:
    """However much longer in bytes than the most tokens."""
    text = "<|im_start|>" * 50_000
    ids = tiny.encode(text, parse_control=True, add_bos=False)
    assert len(text) > len(ids) + tokenizer._FREE_BYTES
    for most in (len(ids), len(ids) - 1):
        assert tiny.encode(text, parse_control=True, add_bos=False, max_tokens=most) == ids


def test_a_beginning_with_too_few_ids_is_not_the_text(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that is far too high must not cut a prompt silently."""
    monkeypatch.setattr(tokenizer, "_PER_CUT", -(1 << 40))
    text = "xyz " * (LONG // 4)
    assert tiny.encode(text, max_tokens=LONG) == tiny.encode(text)
