"""Makes the sequences of a training from a data file: encodes, splits and orders them. The seed decides all of it.

Knows no model. Used by `job` and `loop`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from guanaco.server.training.data.masks import Encoded, Encoder
from guanaco.server.training.data.reading import MAX_LISTED_REFUSALS, DataFile
from guanaco.server.training.data.rows import DataError, Refusal, RefusalKind, RowError, counted
from guanaco.server.training.recipes import num_held_out

TOO_LONG = ("skip", "cut", "refuse")
_GROUPED_BATCHES = 50  # batches whose sequences are sorted by length together
_SHOWN_REFUSALS = 10


@dataclass
class Sequences:
    """The sequences of one file, and counts of the rows that were left out."""

    items: list[Encoded] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    num_refused: Counter[RefusalKind] = field(default_factory=Counter)
    num_cut: int = 0  # conversations that were too long and lost whole exchanges at their end

    @property
    def num_learned(self) -> int:
        """Tokens that count in the loss."""
        return sum(item.num_learned for item in self.items)


def encode_rows(data: DataFile, encoder: Encoder, *, too_long: str = "skip", skip_refused: bool = False) -> Sequences:
    """The sequences of all rows, in the file's order.

    too_long: rows that are too long are left out and counted ("skip"), lose whole exchanges at their end ("cut"), or
    are refused ("refuse"). skip_refused: refused rows are left out and counted. Raises DataError, with a list of
    refusals, if a row is refused or no row is left.
    """
    assert too_long in TOO_LONG
    found = Sequences(refusals=list(data.refusals), num_refused=Counter(data.num_refused))
    for row in data.rows:
        try:
            encoded = encoder.encode(row, may_cut=too_long == "cut")
        except RowError as error:
            found.num_refused[error.kind] += 1
            if len(found.refusals) < MAX_LISTED_REFUSALS:
                found.refusals.append(error.at(row.line))
            continue
        found.num_cut += any(item.num_dropped_messages for item in encoded)
        found.items += encoded
    found.refusals.sort(key=lambda refusal: refusal.line)
    left_out = {RefusalKind.TOO_LONG} if too_long == "skip" else set()
    fatal = [r for r in found.refusals if not skip_refused and r.kind not in left_out]
    if fatal:
        number = sum(count for kind, count in found.num_refused.items() if kind not in left_out)
        raise DataError(f"{data.path}: {_listed(fatal, number)}: mend them, or leave them out with --skip-refused")
    if not found.items:
        raise DataError(f"{data.path}: no row is left to train on: {_listed(found.refusals, len(found.refusals))}")
    return found


def _listed(refusals: Sequence[Refusal], number: int) -> str:
    more = f"; and {number - _SHOWN_REFUSALS} more" if number > _SHOWN_REFUSALS else ""
    rows = "1 row is" if number == 1 else f"{number} rows are"
    return f"{rows} refused: {'; '.join(str(refusal) for refusal in refusals[:_SHOWN_REFUSALS])}{more}"


def summary(data: DataFile, sequences: Sequences) -> tuple[str, ...]:
    """Lines that tell the operator about the data: rows, tokens, and rows that were left out or cut."""
    learned, total = sequences.num_learned, sum(len(item.ids) for item in sequences.items)
    lines = [f"{data.num_rows} rows ({data.format}), {total} tokens, {learned} of them learned"]
    if data.num_duplicates:
        lines.append(f"{data.num_duplicates} rows repeat an earlier one; they are kept")
    if sequences.num_refused:
        first = ", ".join(str(refusal.line) for refusal in sequences.refusals[:_SHOWN_REFUSALS])
        lines.append(
            f"{sequences.num_refused.total()} rows are left out ({counted(sequences.num_refused)}): lines {first}"
        )
    if sequences.num_cut:
        lines.append(f"{sequences.num_cut} conversations were too long and lost whole exchanges at their end")
    return tuple(lines)


def split(items: Sequence[Encoded], share: float, most: int | None, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """(sequences to train on, sequences that are held out), both in the file's order.

    share: of the rows. most: largest number of held-out rows (None: no limit). The seed samples rows, and all sequences
    of a row go to the same part. A file of fewer than 10 rows is trained on whole.
    """
    lines = sorted({item.line for item in items})
    drawn = set(random.Random(seed).sample(lines, num_held_out(len(lines), share, most)))  # noqa: S311 (a split, no secret)
    return [item for item in items if item.line not in drawn], [item for item in items if item.line in drawn]


def training_order(lengths: Sequence[int], number: int, batch_size: int, seed: int, *, grouped: bool) -> list[int]:
    """The order of the sequences in training: `number` indices, epoch after epoch, each in another order.

    grouped: sequences of a batch have nearly the same length, so that little is padded; batches come in random order.
    """
    order: list[int] = []
    epoch = 0
    while len(order) < number:
        rng = random.Random(f"{seed} {epoch}")  # noqa: S311
        indices = list(range(len(lengths)))
        rng.shuffle(indices)
        order += _grouped(indices, lengths, batch_size, rng) if grouped else indices
        epoch += 1
    return order[:number]


def _grouped(indices: list[int], lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[int]:
    batches: list[list[int]] = []
    for start in range(0, len(indices), batch_size * _GROUPED_BATCHES):
        part = sorted(indices[start : start + batch_size * _GROUPED_BATCHES], key=lambda index: lengths[index])
        batches += [part[place : place + batch_size] for place in range(0, len(part), batch_size)]
    partial = [batch for batch in batches if len(batch) < batch_size]
    whole = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(whole)
    return [index for batch in (*whole, *partial) for index in batch]
