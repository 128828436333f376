"""How the tokens of one step are divided: between decoding sequences and prompts, and between floods and all others.

While any sequence decodes, prompts get only a share of the step. An adapter with many open requests floods
(`Turns.floods`): floods together get at most `Limits.flood_step_tokens` of each step, and their sequences take turns.
So a new request waits for a short step, not for one that computes the whole flood.

No clock, no threads, no tensors. Made by the scheduler for each step.
"""

from collections.abc import Collection, Iterable

from guanaco.server.engine.request import Limits, Sequence

# While sequences decode, prompts get at most this share of a step, so that a long prompt delays each of their tokens by
# a quarter of a full step, not by a whole one. A flood's prompts get this share of the flood's tokens, too.
PREFILL_SHARE_WHILE_DECODING = 0.25


class StepShare:
    """How many tokens of one step are still to be handed out."""

    def __init__(self, limits: Limits, floods: Collection[tuple[str, ...]]) -> None:
        """floods: the versions of the adapters that flood, one tuple for each."""
        self._floods = floods if limits.flood_step_tokens else ()
        self._left = self._prompts_left = limits.max_num_batched_tokens
        self._flood_left = self._flood_size = limits.flood_step_tokens
        self._most_for_prompts = max(1, int(limits.max_num_batched_tokens * PREFILL_SHARE_WHILE_DECODING))

    def limit_prompts(self) -> None:
        """Limit prompts to their share, since sequences decode in this step or wait for it."""
        self._prompts_left = min(self._left, self._most_for_prompts)

    def for_prompt(self, sequence: Sequence) -> int:
        """How many tokens of a sequence's prompt may be computed in this step."""
        left = min(self._left, self._prompts_left)
        return min(left, self._flood_left) if sequence.versions in self._floods else left

    def take_prompt(self, sequence: Sequence, num_tokens: int) -> None:
        self._prompts_left -= num_tokens
        self._take(sequence, num_tokens)

    def decoding_in_turn(self, running: Iterable[Sequence]) -> list[Sequence]:
        """The running sequences that need a single token. Those of floods come last, the one whose latest turn is the
        longest ago first."""
        decoding = [s for s in running if s.num_tokens - s.num_computed_tokens == 1]
        if not self._floods:
            return decoding
        flood = [sequence for sequence in decoding if sequence.versions in self._floods]
        others = [sequence for sequence in decoding if sequence.versions not in self._floods]
        return [*others, *sorted(flood, key=lambda sequence: sequence.last_turn)]

    def has_turn(self, sequence: Sequence, *, leave_room: bool) -> bool:
        """Whether a decoding sequence may have its next token. leave_room: a part of the floods' tokens must stay for
        the floods' prompts."""
        if self._left <= 0 or sequence.versions not in self._floods:
            return self._left > 0
        return self._flood_left > int(self._flood_size * PREFILL_SHARE_WHILE_DECODING * leave_room)

    def for_draft(self, sequence: Sequence) -> int:
        """How many draft tokens of a sequence may be computed in this step."""
        return min(self._left, self._flood_left) if sequence.versions in self._floods else self._left

    def take_draft(self, sequence: Sequence, num_tokens: int) -> None:
        self._take(sequence, num_tokens)

    def take_decoding(self, sequence: Sequence) -> None:
        self._take(sequence, 1)

    def _take(self, sequence: Sequence, num_tokens: int) -> None:
        self._left -= num_tokens
        if sequence.versions in self._floods:
            self._flood_left -= num_tokens
