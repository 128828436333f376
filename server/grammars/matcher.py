"""One sequence's place in its grammar: which tokens may come next.

Implements the engine's `Constraint`. Masks may be filled on another thread, one at a time and never during `accept`. No
method raises: a matcher that can't go on has an `error`.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from guanaco.models.error_codes import ErrorCode
from guanaco.server.grammars.vocabulary import Bits, Vocabulary, bits_of

logger = logging.getLogger("guanaco.grammars")


class GrammarMatcher:
    """A matcher of llguidance, with the request's own end tokens."""

    def __init__(
        self,
        prototype: Any,
        vocabulary: Vocabulary,
        ends: Collection[int],
        on_limit: Callable[[], None] = lambda: None,
        *,
        kind: str = "",
    ) -> None:
        """prototype: an LLMatcher in its first state, which is copied. ends: the token ids that may end the answer.
        on_limit: called when llguidance reaches a limit; then the prototype may be useless, too. kind: the grammar's
        kind."""
        self.error: ErrorCode | None = None
        self.is_complete = False  # the text is complete, and nothing can be added to it
        self._matcher = prototype.deep_copy()
        self._vocabulary = vocabulary
        self._on_limit = on_limit
        self._ends = frozenset(index for index in ends if 0 <= index < vocabulary.num_ids)
        self._end_bits = bits_of(sorted(self._ends), vocabulary.num_words)
        self._known_bits = vocabulary.bits_for(kind)
        self._mask = np.zeros(vocabulary.num_words, dtype=np.int32)
        self._forced = b""  # the rest of the text that `forced` found

    def is_end(self, token_id: int) -> bool:
        return token_id in self._ends

    def fill(self, row: Bits) -> None:
        """Set `row`, [(vocabulary + 31) // 32] words, to the mask of the ids that may come next."""
        try:
            if self.error is None:
                self._mask_of(self._matcher, row)
                self._look()
        except BaseException as error:  # a panic of the library is no Exception
            self._fail("its mask failed", ErrorCode.GRAMMAR_STUCK, error)
        if self.error is not None:
            row[:] = 0
        elif not row.any():
            self._fail("nothing may follow", ErrorCode.GRAMMAR_STUCK)

    def fill_ahead(self, draft: Sequence[int], rows: Bits) -> None:
        """Fill rows[i] with the mask after draft[:i]. Rows after a token that is not allowed, or after the end, get all
        ids. The matcher keeps its place. If llguidance fails at a row, its mask is empty."""
        self.fill(rows[0])
        rows[1:] = -1
        if self.error is not None:
            return
        try:
            ahead = self._matcher.deep_copy()
            for place, token in enumerate(draft, start=1):
                if token in self._ends or not ahead.consume_token(token) or ahead.is_stopped():
                    return
                self._mask_of(ahead, rows[place])
                if ahead.is_error():
                    rows[place] = 0
                    return
        except BaseException:  # a panic of the library is no Exception
            logger.warning("a grammar failed within a draft", exc_info=True)
            rows[1:] = 0

    def num_allowed(self, draft: Sequence[int]) -> int:
        """How many of the draft's first tokens may come next, one after the other, before an end."""
        is_end = (place for place, token in enumerate(draft) if token in self._ends)
        before_end = list(draft[: next(is_end, len(draft))])
        try:
            return 0 if self.error is not None else int(self._matcher.validate_tokens(before_end))
        except BaseException:  # a panic of the library is no Exception
            logger.warning("a grammar could not read a draft", exc_info=True)
            return 0

    def forced(self) -> bytes:
        """The text that must come next, as UTF-8 that may end within a character. Empty if there is a choice."""
        if self.error is not None or self.is_complete:
            return b""
        try:
            if not self._forced:
                # Looking ahead may reach a limit that the text itself never does: then only the copy is lost.
                self._forced = bytes(self._matcher.deep_copy().compute_ff_bytes())
        except BaseException:  # a panic of the library is no Exception
            logger.warning("a grammar could not say what it forces", exc_info=True)
        return self._forced

    def _mask_of(self, matcher: Any, row: Bits) -> None:
        """Write the mask of a matcher's next ids into `row`. Does not check whether llguidance gave up."""
        mask, num_ids = self._mask, self._vocabulary.num_ids
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        may_end = bool((int(mask[num_ids // 32]) >> (num_ids % 32)) & 1)
        mask &= self._known_bits
        if may_end:
            mask |= self._end_bits
        row[:] = mask[: len(row)]

    def accept(self, token_id: int) -> None:
        """Move on by the token that was sampled. It must not be an end token."""
        try:
            text = self._vocabulary.tokens[token_id]
            self._forced = self._forced[len(text) :] if text and self._forced.startswith(text) else b""
            if self.error is None and not self._matcher.consume_token(token_id):
                self._look()
                self._fail("a token was sampled that the grammar does not allow", ErrorCode.GRAMMAR_STUCK)
            self._look()
            self.is_complete = self.error is None and bool(self._matcher.is_stopped())
        except BaseException as error:  # a panic of the library is no Exception
            self._fail("a token failed", ErrorCode.GRAMMAR_STUCK, error)

    def _look(self) -> None:
        """Set `error` if llguidance has given up."""
        if self.error is None and self._matcher.is_error():
            reason = self._matcher.stop_reason()
            # Not every limit has a stop reason of its own.
            text = self._matcher.get_error()
            is_limit = reason in ("ParserTooComplex", "LexerTooComplex") or "too many" in text or "max is" in text
            if is_limit:
                self._on_limit()
            self._fail(reason, ErrorCode.GRAMMAR_TOO_COMPLEX if is_limit else ErrorCode.GRAMMAR_STUCK)

    def _fail(self, why: str, error: ErrorCode, raised: BaseException | None = None) -> None:
        """End the request with `error`. The log gets the stack of the exception `raised`."""
        if self.error is None:
            logger.warning("a grammar ends its request: %s", why, exc_info=raised)
            self.error = error
