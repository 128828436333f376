"""Files of verdicts and scores: what is read, what is refused and in which words."""

import gzip
from pathlib import Path

import pytest

from guanaco.server.errors import CommandError
from guanaco.server.judging import stored
from guanaco.server.judging.stored import (
    Scores,
    Verdict,
    read_scores,
    read_verdicts,
    scores_csv,
    verdicts_csv,
)

VERDICTS = [
    Verdict("mine", "a, the first", "b", "1", 1),
    Verdict("mine", "b", "a, the first", "1", 2),
    Verdict("mine", "a, the first", "b", 'two\n"lines"', 3),
    Verdict("mine", "b", "a, the first", "2", None),
]
SCORES = [Scores("a", "b", "1", 7.5, 9.0), Scores("b", "a", "1", None, None)]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    file.write_text(verdicts_csv(VERDICTS), newline="")
    assert read_verdicts(file) == VERDICTS
    packed = tmp_path / "scores.csv.gz"
    packed.write_bytes(gzip.compress(scores_csv(SCORES).encode()))
    assert read_scores(packed) == SCORES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("benchmark,first,second,question\n", "add verdict"),
        ("", "add benchmark"),
        ("benchmark,first,second,question,verdict\nv,a,b,1,4\n", "line 2: verdict '4'"),
        ("benchmark,first,second,question,verdict\nv,a,a,1,1\n", "line 2: 'a' meets itself"),
        ("benchmark,first,second,question,verdict\nv,a,,1,1\n", "line 2: a player without a name"),
        ("benchmark,first,second,question,verdict\nv,a,b,1,1\nv,a,b\n", "line 3: it has fewer fields"),
    ],
)
def test_wrong_verdicts_are_named_by_their_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "verdicts.csv"
    file.write_text(text)
    with pytest.raises(CommandError, match=words):
        read_verdicts(file)


def test_minus_one_is_an_unreadable_score_as_in_the_released_files(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("first,second,question,first_score,second_score\na,b,1,-1,-1\na,b,2,,9\n")
    assert [(s.first_score, s.second_score) for s in read_scores(file)] == [(None, None)] * 2


@pytest.mark.parametrize("score", ["many", "nan", "inf", "-2"])
def test_wrong_scores_are_named_by_their_line(tmp_path: Path, score: str) -> None:
    file = tmp_path / "scores.csv"
    file.write_text(f"first,second,question,first_score,second_score\na,b,1,9,{score}\n")
    with pytest.raises(CommandError, match="line 2: score"):
        read_scores(file)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match="No such file"):
        read_verdicts(tmp_path / "absent.csv")
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"benchmark,first,second,question,verdict\n" * 99)[:-9])
    with pytest.raises(CommandError, match="cannot be read"):
        read_verdicts(cut)
    foreign = tmp_path / "latin.csv"
    foreign.write_bytes(b"benchmark,\xe9")
    with pytest.raises(CommandError, match="not UTF-8 at byte 10"):
        read_verdicts(foreign)
    monkeypatch.setattr(stored, "MAX_BYTES", 1000)
    bomb = tmp_path / "bomb.csv.gz"
    bomb.write_bytes(gzip.compress(b"a" * 1001))
    with pytest.raises(CommandError, match="split the file"):
        read_verdicts(bomb)
