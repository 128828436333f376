"""The drafts of each step: guesses of the next tokens of each sequence, as many as are worth their rows.

Start here: `drafts` is called once per step with the sequences that may have one. Keeps a record for each open
sequence; `forget` drops it. Called by `step_drafts`, on the scheduler's behalf.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from guanaco.server.engine.constraints import Constraint
from guanaco.server.engine.request import Sequence as EngineSequence
from guanaco.server.engine.speculation.acceptance import FORCED, Acceptance, class_of
from guanaco.server.engine.speculation.costs import TYPICAL, StepCosts
from guanaco.server.engine.speculation.depth import depths
from guanaco.server.engine.speculation.lookup import Lookup
from guanaco.server.engine.speculation.suffix import PastAnswers, SuffixLookup

MAX_DRAFT_TOKENS = 15  # of one sequence in one step: sixteen rows are one tile of the GPU's kernels

# A grammar may force a text of any length, and is asked in each step: only so much is divided into tokens.
_MOST_FORCED_BYTES = 256


class Wish(NamedTuple):
    """A sequence that may have a draft in this step, and the most tokens of this draft."""

    sequence: EngineSequence
    most: int


@dataclass(eq=False)
class _Record:
    """The source of guesses for one open sequence, and how often they were right."""

    lookup: Lookup | SuffixLookup
    acceptance: Acceptance = field(default_factory=Acceptance)
    forced_from: int = 0  # the index of the first of `forced`
    forced: list[int] = field(default_factory=list)  # the tokens of the last step's forced text

    def judge_forced(self, token_ids: Sequence[int]) -> None:
        """Learn how many tokens of `forced` were right."""
        for expected, token in zip(self.forced, token_ids[self.forced_from :], strict=False):
            self.acceptance.learn(FORCED, expected == token)
            if expected != token:
                break
        self.forced = []


def namespace_of(sequence: EngineSequence) -> Hashable:
    """(cache salt, versions and scales of the adapters). The salt contains the API key. One request is drafted from the
    answer of another only if their namespaces are equal."""
    request = sequence.request
    return request.cache_salt, tuple((lora.version, lora.scale) for lora in request.loras)


class Speculator:
    """Drafts for all sequences of one engine: text that a grammar forces, or else the tokens after an earlier place."""

    def __init__(
        self,
        costs: StepCosts = TYPICAL,
        encode: Callable[[str], list[int]] | None = None,
        *,
        weighs_places: bool = False,
        past: PastAnswers | None = None,
    ) -> None:
        """costs: the time of a step by its rows. encode: text → token ids, without control tokens; None: text that
        grammars force makes no drafts.

        weighs_places: use `suffix` instead of `lookup`. past: where answers are kept for later ones; None: nowhere.
        """
        assert past is None or weighs_places, "only suffix drafts read past answers"
        self.costs = costs
        self._weighs_places = weighs_places
        self._past = past
        self._encode = encode
        self._records: dict[int, _Record] = {}  # by arrival number

    def drafts(self, wishes: Sequence[Wish], num_rows: int, num_others: int) -> list[tuple[int, ...]]:
        """The draft of each sequence, empty for most.

        num_rows: the step's rows without drafts. num_others: the sequences of the step that are not in `wishes`.
        """
        found = [self._guesses(wish) for wish in wishes]
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
        """The number of open sequences with a record."""
        return len(self._records)

    def forget(self, sequence: EngineSequence) -> None:
        """Drop the record of a sequence that has ended. Its answer is added to the past answers, if they are kept."""
        self._records.pop(sequence.arrival_number, None)
        if self._past is not None and sequence.request.params.speculation:
            self._past.add(namespace_of(sequence), sequence.token_ids[sequence.num_prompt_tokens :])

    def _new_record(self, sequence: EngineSequence) -> _Record:
        if not self._weighs_places:
            return _Record(Lookup())
        return _Record(SuffixLookup(() if self._past is None else self._past.of(namespace_of(sequence))))

    def _guesses(self, wish: Wish) -> tuple[list[int], list[float]]:
        """(the tokens that may follow, each one's chance if those before it are right)."""
        sequence, most = wish.sequence, min(wish.most, MAX_DRAFT_TOKENS)
        record = self._records.get(sequence.arrival_number)
        if record is None:
            record = self._records[sequence.arrival_number] = self._new_record(sequence)
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
        """The tokens of the text that a grammar forces, up to the first that the grammar's mask does not allow. The
        tokenizer divides the text; a model mostly divides it in the same way."""
        if self._encode is None or not (forced := constraint.forced()):
            return []
        text = forced[:_MOST_FORCED_BYTES].decode(errors="ignore")  # the end may be half a character
        tokens = self._encode(text) if text else []
        if len(forced) > _MOST_FORCED_BYTES:
            tokens = tokens[:-1]  # the text was cut here: as a whole it may have another last token
        return tokens[: constraint.num_allowed(tokens)]
