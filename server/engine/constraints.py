"""Limits a sequence's next tokens (`Constraint`), and fills a step's masks while its forward pass runs (`MaskFiller`).

Knows no grammar: `server.grammars` implements `Constraint`. No torch here: a mask is int32 words whose bit i stands for
token id i. Called by the model runner, before and after the forward pass.
"""

import logging
import os
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from guanaco.models.error_codes import ErrorCode

Words = NDArray[np.int32]

logger = logging.getLogger(__name__)

_MOST_THREADS = 4


class Constraint(Protocol):
    """Says which tokens may come next in one sequence. It keeps its place through preemptions: `accept` gets each
    sampled token once."""

    error: ErrorCode | None  # why no token can follow; the request ends with this error
    is_complete: bool  # the text is whole and nothing can follow: the request ends

    def is_end(self, token_id: int) -> bool:
        """Whether this token ends the answer. `accept` never gets such a token."""

    def fill(self, row: Words) -> None:
        """Set the bits of the ids that may come next. Called on any thread, but never by two at once. Calling it again
        is harmless."""

    def fill_ahead(self, draft: Sequence[int], rows: Words) -> None:
        """Fill a mask for each place in a draft: rows[i] gets the ids that may come after draft[:i].

        rows: int32 [len(draft) + 1, words]. Rows after a draft token that is not allowed, and rows after the end of the
        text, get all ids: their tokens are not used. Called as `fill` is; the constraint keeps its place.
        """

    def num_allowed(self, draft: Sequence[int]) -> int:
        """How many of the draft's first tokens may come next, one after the other, before an end."""

    def forced(self) -> bytes:
        """The text that must come next; empty if there is a choice. The masks may allow several ways to divide it into
        tokens. Called between steps."""

    def accept(self, token_id: int) -> None:
        """Move on by the token that was sampled."""


@dataclass(frozen=True)
class StepMasks:
    """The masks of one step.

    rows: the indexes of the sampled rows that have a mask, ascending. words: int32 [rows, words].
    """

    rows: tuple[int, ...]
    words: Words
    errors: dict[int, ErrorCode]  # by index of a sampled row: why its request must end


def words_of(num_ids: int) -> int:
    return (num_ids + 31) // 32


@dataclass(frozen=True, eq=False)
class AllowedTokens:
    """The ids that a request may sample, as a mask that never changes. words: int32 [words of the largest id + 1]."""

    words: Words

    @classmethod
    def of(cls, token_ids: Collection[int]) -> "AllowedTokens":
        """The mask of these token ids. There must be at least one."""
        ids = np.fromiter(token_ids, dtype=np.int64)
        flags = np.zeros(32 * words_of(int(ids.max()) + 1), dtype=np.uint8)
        flags[ids] = 1
        return cls(np.packbits(flags, bitorder="little").view("<i4").astype(np.int32))

    def padded(self, num_words: int) -> Words:
        """A copy that is cut or filled with zeros to `num_words` words."""
        words = np.zeros(num_words, dtype=np.int32)
        common = min(num_words, len(self.words))
        words[:common] = self.words[:common]
        return words


class PendingMasks:
    """Masks that are being filled."""

    def __init__(self, rows: tuple[int, ...], constraints: list[Constraint], words: Words, work: list[Future[None]]):
        """rows: the indexes of the sampled rows. constraints: one for each of them. words: int32 [rows, words], which
        `work` fills."""
        self._rows, self._constraints, self._words, self._work = rows, constraints, words, work

    def join(self) -> StepMasks:
        """Wait until all masks are filled. Must be called in every case, or two threads could fill one mask at once.

        A mask that could not be filled, or that allows no token, makes an error for its row: any sampled token would be
        wrong.
        """
        wait(self._work)
        errors: dict[int, ErrorCode] = {}
        for row, constraint, words in zip(self._rows, self._constraints, self._words, strict=True):
            if constraint.error is not None or not words.any():
                errors[row] = constraint.error or ErrorCode.GRAMMAR_STUCK
        return StepMasks(self._rows, self._words, errors)


class MaskFiller:
    """Threads that fill masks; they start with the first sequence that needs one."""

    def __init__(self, num_ids: int, num_threads: int | None = None) -> None:
        """num_ids: the width of the logits. num_threads: None: half of the processors, at most 4."""
        self._num_words = words_of(num_ids)
        self._num_threads = num_threads or max(1, min(_MOST_THREADS, (os.cpu_count() or 2) // 2))
        self._pool: ThreadPoolExecutor | None = None

    def start(
        self, constraints: Sequence[Constraint | None], drafts: Sequence[Sequence[int]] | None = None
    ) -> PendingMasks | None:
        """Begin to fill the masks of one step. None if no row has a constraint.

        constraints, drafts: one entry for each sampled sequence. A sequence has a row for its newest token, and one for
        each token of its draft. drafts None: no sequence has a draft.
        """
        rows: list[int] = []
        parts: list[tuple[Constraint, Sequence[int], int]] = []  # (constraint, draft, its first place in `rows`)
        first = 0
        for constraint, draft in zip(constraints, drafts or ((),) * len(constraints), strict=True):
            if constraint is not None:
                parts.append((constraint, draft, len(rows)))
                rows += range(first, first + len(draft) + 1)
            first += len(draft) + 1
        if not parts:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="guanaco-masks")
        words = np.zeros((len(rows), self._num_words), dtype=np.int32)
        owners = [constraint for constraint, draft, _ in parts for _ in range(len(draft) + 1)]
        shares = [parts[start :: self._num_threads] for start in range(min(self._num_threads, len(parts)))]
        work = [self._pool.submit(_fill, share, words) for share in shares]
        return PendingMasks(tuple(rows), owners, words, work)


def _fill(parts: list[tuple[Constraint, Sequence[int], int]], words: Words) -> None:
    for constraint, draft, first in parts:
        rows = words[first : first + len(draft) + 1]
        try:
            if draft:
                constraint.fill_ahead(draft, rows)
            else:
                constraint.fill(rows[0])
        except Exception:
            logger.exception("a mask could not be filled")
            rows[:] = 0
