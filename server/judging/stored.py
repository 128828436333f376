"""Stored results: verdicts and scores in CSV files, plain or gzipped, read with limits and written the same way."""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guanaco.server.errors import CommandError

MAX_BYTES = 512 << 20  # of one file, unpacked: about six million verdicts
VERDICT_COLUMNS = ("benchmark", "first", "second", "question", "verdict")
SCORE_COLUMNS = ("first", "second", "question", "first_score", "second_score")
_UNREADABLE = -1.0  # an unreadable score in the scores that the QLoRA authors released
_VERDICTS = {"1": 1, "2": 2, "3": 3, "": None}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on two answers. first, second: the players. question: the prompt's id. verdict: 1 or 2 for the
    better answer, 3 for a tie, None: unreadable."""

    benchmark: str
    first: str
    second: str
    question: str
    verdict: int | None


@dataclass(frozen=True, slots=True)
class Scores:
    """The points that a judge gave to two answers; both are None if they could not be read."""

    first: str
    second: str
    question: str
    first_score: float | None
    second_score: float | None


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a CSV file (`.gz` too) with VERDICT_COLUMNS. Raises CommandError, which names the wrong line."""
    verdicts = []
    for line, row in _rows(path, VERDICT_COLUMNS):
        text = row["verdict"].strip()
        if text not in _VERDICTS:
            raise CommandError(
                f"{path}, line {line}: verdict {text[:40]!r}: expected 1, 2, 3 (a tie), or nothing (unreadable)"
            )
        _check_players(path, line, row)
        verdicts.append(Verdict(row["benchmark"], row["first"], row["second"], row["question"], _VERDICTS[text]))
    return verdicts


def read_scores(path: Path) -> list[Scores]:
    """The scores of a CSV file (`.gz` too) with SCORE_COLUMNS. Raises CommandError, which names the wrong line."""
    scores = []
    for line, row in _rows(path, SCORE_COLUMNS):
        _check_players(path, line, row)
        first, second = (_score(path, line, row[column]) for column in ("first_score", "second_score"))
        if first is None or second is None:
            first = second = None
        scores.append(Scores(row["first"], row["second"], row["question"], first, second))
    return scores


def verdicts_csv(verdicts: list[Verdict]) -> str:
    """The text of a CSV file that `read_verdicts` reads."""
    rows = ((v.benchmark, v.first, v.second, v.question, v.verdict or "") for v in verdicts)
    return _csv(VERDICT_COLUMNS, rows)


def scores_csv(scores: list[Scores]) -> str:
    """The text of a CSV file that `read_scores` reads."""
    rows = (
        (s.first, s.second, s.question, *("" if x is None else x for x in (s.first_score, s.second_score)))
        for s in scores
    )
    return _csv(SCORE_COLUMNS, rows)


def _csv(columns: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise CommandError(f"{path}: the first line must name the columns {', '.join(columns)}: add {missing[0]}")
        for row in reader:
            if any(row[column] is None for column in columns):
                raise CommandError(f"{path}, line {reader.line_num}: it has fewer fields than the first line")
            yield reader.line_num, row
    except csv.Error as error:
        raise CommandError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _text(path: Path) -> str:
    """The unpacked text of a file. A file that unpacks to more than MAX_BYTES is refused before memory is used up."""
    try:
        with path.open("rb") as plain:
            is_packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_packed else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > MAX_BYTES:
        raise CommandError(f"{path}: more than {MAX_BYTES >> 20} MiB of text: split the file by benchmark")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8 at byte {error.start}: save the file as UTF-8") from None


def _check_players(path: Path, line: int, row: dict[str, str]) -> None:
    if not row["first"] or not row["second"]:
        raise CommandError(f"{path}, line {line}: a player without a name")
    if row["first"] == row["second"]:
        raise CommandError(f"{path}, line {line}: {row['first'][:80]!r} meets itself: a pair needs two players")


def _score(path: Path, line: int, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if score == _UNREADABLE:
        return None
    if not math.isfinite(score) or score < 0:
        raise CommandError(
            f"{path}, line {line}: score {text[:40]!r}: expected a number from 0 on, or nothing (unreadable)"
        )
    return score
