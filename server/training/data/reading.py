"""Makes rows from a file of training data: reads the lines, finds the format, counts duplicates, lists refusals.

Knows no tokens. A file is JSON lines, one JSON array, or a `.txt` file with an empty line between two texts. Called by
the training and by the check of uploaded files; needs no library of the `train` extra.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from guanaco.models.formats.strict_json import JsonError, parse_object
from guanaco.server.training.data.importers import FORMATS, detect_format, import_row
from guanaco.server.training.data.rows import DataError, Refusal, RefusalKind, Row, RowError

__all__ = ["FORMATS", "DataFile", "read_conversations"]

MAX_LINE_BYTES = 16 << 20  # of one row, or of one element of a JSON array
_READ_BYTES = 1 << 20  # read of a JSON array at a time
MAX_LISTED_REFUSALS = 1000  # further refusals are only counted


@dataclass
class DataFile:
    """The rows and the refusals of a file of training data."""

    path: Path
    format: str  # a name of FORMATS
    sha256: str  # of the file's bytes, hex
    rows: list[Row] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)  # the first MAX_LISTED_REFUSALS of them
    num_refused: Counter[RefusalKind] = field(default_factory=Counter)
    num_good: int = 0  # rows that can be trained on, also if `rows` stays empty
    num_duplicates: int = 0  # rows with the content of an earlier row; they are kept

    @property
    def num_rows(self) -> int:
        """All rows of the file, refused ones included."""
        return self.num_good + self.num_refused.total()

    def refuse(self, refusal: Refusal) -> None:
        """Count a refusal, and keep it while there is room."""
        self.num_refused[refusal.kind] += 1
        if len(self.refusals) < MAX_LISTED_REFUSALS:
            self.refusals.append(refusal)


def read_conversations(
    path: Path, format: str | None = None, *, guanaco_as_text: bool = False, keeps_rows: bool = True
) -> DataFile:
    """All rows of a file, in their order, and the refusals with line numbers and reasons.

    format: a name in FORMATS; None: the format of the first row that has a known one. guanaco_as_text: a text with
    `### Human:` headings stays a text that is learned as a whole, as the released recipe of 2023 has it. keeps_rows:
    False only counts the rows, in memory that does not grow with the file; duplicates are not looked for.

    A row that can't be trained on is a refusal in the result. Raises DataError for an unknown `format`, and for a file
    that can't be read or has no rows.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"no data format is called {format}: write one of {', '.join(FORMATS)}")
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            kind = "text" if path.suffix == ".txt" else _first_byte(file)
            lines = {"text": _paragraphs, "array": _elements}.get(kind, _json_lines)(file, digest)
            data = _import(path, lines, format, guanaco_as_text, keeps_rows)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): name a file of training data") from None
    data.sha256 = digest.hexdigest()
    if not data.num_rows:
        raise DataError(f"{path} has no rows: write one JSON object a line, such as {_EXAMPLE}")
    return data


_EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_WHITE = re.compile(r"[ \t\r\n]*")
_Line = tuple[int, Mapping[str, Any] | RowError]  # (number from 1, the row's fields or its error)


def _import(
    path: Path, lines: Iterator[_Line], format_name: str | None, guanaco_as_text: bool, keeps_rows: bool
) -> DataFile:
    data = DataFile(path, format_name or "", "")
    seen: set[bytes] = set()
    for number, fields in lines:
        try:
            if isinstance(fields, RowError):
                raise fields
            data.format = data.format or detect_format(fields)
            as_text = data.format == "guanaco" and guanaco_as_text
            row = import_row("text" if as_text else data.format, fields, number)
        except RowError as error:
            data.refuse(error.at(number))
            continue
        data.num_good += 1
        if not keeps_rows:
            continue
        content = hashlib.sha256(repr(row.content()).encode("utf-8", "surrogatepass")).digest()
        data.num_duplicates += content in seen
        seen.add(content)
        data.rows.append(row)
    return data


def _first_byte(file: BinaryIO) -> str:
    """ "array" for a JSON array, "lines" for JSON lines, by the first byte that is no white space."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return "array" if start.startswith(b"[") else "lines"


def _json_lines(file: BinaryIO, digest: Any) -> Iterator[_Line]:
    """The object on each line that is not empty. A byte order mark at the start is skipped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        digest.update(line)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
                digest.update(line)
            yield (
                number,
                RowError(RefusalKind.TOO_LONG, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB: split it"),
            )
        elif line.strip():
            yield number, _object(line)


def _object(line: bytes) -> Mapping[str, Any] | RowError:
    try:
        return parse_object(line.strip())
    except JsonError as error:
        return RowError(RefusalKind.NOT_JSON, f"the line {error}: write one JSON object a line")


def _elements(file: BinaryIO, digest: Any) -> Iterator[_Line]:
    """The elements of a JSON array, numbered from 1. Memory holds one element, and the bytes read after it."""
    text = _ArrayText(file, digest)
    try:
        for number, element in enumerate(text.elements(), start=1):
            if isinstance(element, dict):
                yield number, element
            else:
                yield number, RowError(RefusalKind.BAD_FIELDS, "the element is no object: write objects")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file.name} begins as a JSON array but is not one ({error}): correct it, or write JSON lines"
        ) from None


class _ArrayText:
    """The text of a JSON array, read piece by piece."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._place = 0  # in the text; everything before it was used
        self._is_whole = False  # the file was read to its end

    def elements(self) -> Iterator[Any]:
        """Each element. Raises ValueError if the text is no array, or an element is longer than MAX_LINE_BYTES."""
        self._sign("[")
        if self._next() == "]":
            self._sign("]")
        else:
            sign = ","
            while sign == ",":
                self._next()
                yield self._element()
                sign = self._sign(",]")
        if self._next():
            raise ValueError("something follows its end")

    def _next(self) -> str:
        """The next character that is no white space, without using it up; "" at the end of the file."""
        while True:
            self._place = _WHITE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def _sign(self, signs: str) -> str:
        found = self._next()
        if not found or found not in signs:
            raise ValueError(f"expected {' or '.join(signs)}" + (f", not {found!r}" if found else " before its end"))
        self._place += 1
        return found

    def _element(self) -> Any:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._place)
                if end < len(self._text) or self._is_whole:  # a number may continue in bytes that are not read yet
                    self._place = end
                    return value
            except json.JSONDecodeError:
                if self._is_whole:
                    raise
            if len(self._text) - self._place > MAX_LINE_BYTES:
                raise ValueError(f"an element is wrong, or longer than {MAX_LINE_BYTES >> 20} MiB")
            # A cut element is parsed again from its beginning, so twice as much of it is read each time.
            self._more(len(self._text) - self._place)

    def _more(self, num_bytes: int = 0) -> bool:
        """Read on. False at the end of the file."""
        piece = self._file.read(max(_READ_BYTES, num_bytes))
        self._digest.update(piece)
        self._is_whole = not piece
        self._text = self._text[self._place :] + self._decoder.decode(piece, final=not piece)
        self._place = 0
        return bool(piece)


def _paragraphs(file: BinaryIO, digest: Any) -> Iterator[_Line]:
    """The texts of a `.txt` file, each as the fields of the format `text`. A text ends at an empty line."""
    parts: list[str] = []
    start = number = num_bytes = 0
    for number, line in enumerate(file, start=1):
        digest.update(line)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield number, RowError(RefusalKind.BAD_FIELDS, "the line is not UTF-8: convert the file")
            continue
        if text.strip():
            start, num_bytes = start or number, num_bytes + len(line)
            if num_bytes > MAX_LINE_BYTES:
                raise DataError(
                    f"{file.name}: the text at line {start} is longer than {MAX_LINE_BYTES >> 20} MiB: split it"
                )
            parts.append(text)
        elif parts:
            yield start, {"text": "\n".join(parts)}
            parts, start, num_bytes = [], 0, 0
    if parts:
        yield start, {"text": "\n".join(parts)}
