"""The drafts of each step: what may come next in each sequence, and how much of it is worth its rows.

Start here: `drafts` is called once per step with the sequences that may have one. Keeps a record for each open
sequence; `forget` drops it. Called by `step_drafts`, on the scheduler's behalf.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from guanaco.server.engine.constraints import Constraint
from guanaco.server.engine.request import Sequence as EngineSequence
from guanaco.server.engine.speculation.acceptance import FORCED, Acceptance, class_of
from guanaco.server.engine.speculation.costs import TYPICAL, StepCosts
from guanaco.server.engine.speculation.depth import depths
from guanaco.server.engine.speculation.lookup import Lookup

MAX_DRAFT_TOKENS = 15  # of one sequence in one step: sixteen rows are one tile of the GPU's kernels


class Wish(NamedTuple):
    """A sequence that may have a draft in this step, and the most tokens of it."""

    sequence: EngineSequence
    most: int


@dataclass(eq=False)
class _Record:
    """What is known of one open sequence."""

    lookup: Lookup = field(default_factory=Lookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    forced_from: int = 0  # the index of the first of `forced`
    forced: list[int] = field(default_factory=list)  # what a grammar's text was expected to be, in the last step

    def judge_forced(self, token_ids: Sequence[int]) -> None:
        """Learn how much of `forced` came as it was expected."""
        for expected, token in zip(self.forced, token_ids[self.forced_from :], strict=False):
            self.acceptance.learn(FORCED, expected == token)
            if expected != token:
                break
        self.forced = []


class Speculator:
    """Drafts for all sequences of one engine: text that a grammar forces, else prompt lookup."""

    def __init__(self, costs: StepCosts = TYPICAL, encode: Callable[[str], list[int]] | None = None) -> None:
        """encode: text → token ids, without control tokens; None: text that grammars force makes no drafts."""
        self.costs = costs
        self._encode = encode
        self._records: dict[int, _Record] = {}  # by arrival number

    def drafts(self, wishes: Sequence[Wish], num_rows: int, num_others: int) -> list[tuple[int, ...]]:
        """The draft of each sequence, empty for most.

        num_rows: the step's rows without drafts. num_others: the sequences of the step that are not in `wishes`.
        """
        found = [self._foretold(wish) for wish in wishes]
        lengths = depths(
            [chances for _, chances in found if chances],
            num_rows,
            num_others > 0 or any(not chances for _, chances in found),
            self.costs,
        )
        left = iter(lengths)
        return [tuple(tokens[: next(left)]) if chances else () for tokens, chances in found]

    @property
    def num_records(self) -> int:
        """How many open sequences something is known of."""
        return len(self._records)

    def forget(self, sequence: EngineSequence) -> None:
        """Drop what is known of a sequence that has ended."""
        self._records.pop(sequence.arrival_number, None)

    def _foretold(self, wish: Wish) -> tuple[list[int], list[float]]:
        """(the tokens that may follow, each one's chance if those before it are right)."""
        sequence, most = wish.sequence, min(wish.most, MAX_DRAFT_TOKENS)
        record = self._records.get(sequence.arrival_number)
        if record is None:
            record = self._records[sequence.arrival_number] = _Record()
        lookup, acceptance = record.lookup, record.acceptance
        for length, is_right in lookup.follow(sequence.token_ids, sequence.num_prompt_tokens):
            acceptance.learn(class_of(length), is_right)
        record.judge_forced(sequence.token_ids)
        if (constraint := sequence.request.constraint) is not None:
            if forced := self._forced(constraint)[:most]:
                record.forced_from, record.forced = sequence.num_tokens, forced
                return forced, [acceptance.chance(FORCED)] * len(forced)
            tokens = lookup.draft(sequence.token_ids, most)
            tokens = tokens[: constraint.num_allowed(tokens)] if tokens else tokens
        else:
            tokens = lookup.draft(sequence.token_ids, most)
        return tokens, [acceptance.chance(class_of(lookup.length + i)) for i in range(len(tokens))]

    def _forced(self, constraint: Constraint) -> list[int]:
        """The text that a grammar forces, as the tokenizer divides it: a model mostly does the same. Only what the
        grammar's masks let through."""
        if self._encode is None or not (forced := constraint.forced()):
            return []
        text = forced.decode(errors="ignore")  # the end may be half a character
        tokens = self._encode(text) if text else []
        return tokens[: constraint.num_allowed(tokens)]
