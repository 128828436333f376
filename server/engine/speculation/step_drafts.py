"""Gives drafts to the decoding sequences of a step, within its unused tokens and KV blocks. Called by the scheduler."""

from typing import Protocol

from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.request import ScheduledSequence, Sequence
from guanaco.server.engine.speculation.speculator import Wish
from guanaco.server.engine.step_share import StepShare


class Drafting(Protocol):
    """Where drafts come from: `speculator.Speculator`, or a made-up one in the tests."""

    def drafts(self, wishes: list[Wish], num_rows: int, num_others: int) -> list[tuple[int, ...]]:
        """The draft of each of `wishes`, at most `most` tokens each."""

    def forget(self, sequence: Sequence) -> None:
        """Drop the record of a sequence that has ended."""


def add_drafts(
    drafting: Drafting,
    chosen: dict[int, ScheduledSequence],
    share: StepShare,
    blocks: BlockManager,
    num_running: int,
    max_model_len: int,
) -> None:
    """Add drafts to the sequences in `chosen`. They use only tokens and KV blocks that nothing else of the step needs.

    Called when the rest of the step is decided. So drafts preempt no sequence and delay no prompt to a later step. One
    block for each running sequence stays free, as at admission.
    """
    wishes = []
    for item in chosen.values():
        if (most := min(_most_tokens(item, max_model_len), share.for_draft(item.sequence))) > 0:
            wishes.append(Wish(item.sequence, most))
    if not wishes:
        return
    num_rows = sum(item.num_new_tokens for item in chosen.values())
    for wish, draft in zip(wishes, drafting.drafts(wishes, num_rows, len(chosen) - len(wishes)), strict=True):
        sequence = wish.sequence
        assert len(draft) <= wish.most, "a draft longer than its sequence may become"
        fitting = draft[: share.for_draft(sequence)]
        num_tokens = sequence.num_tokens + len(fitting)
        spare = blocks.num_free_blocks - max(0, blocks.num_missing_blocks(sequence, num_tokens))
        if fitting and spare >= num_running and blocks.allocate(sequence, num_tokens):
            item = chosen[sequence.arrival_number]
            chosen[sequence.arrival_number] = item._replace(draft=fitting)
            share.take_draft(sequence, len(fitting))


def _most_tokens(item: ScheduledSequence, max_model_len: int) -> int:
    """The longest draft of a sequence. One more token is sampled after the draft, and it must not exceed the limits."""
    sequence, params = item.sequence, item.sequence.request.params
    if not item.needs_sample or item.num_new_tokens != 1 or not params.speculation:
        return 0
    return min(params.max_tokens - sequence.num_output_tokens, max_model_len - sequence.num_tokens) - 1
