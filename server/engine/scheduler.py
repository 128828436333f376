"""Decides what the next step computes, from the messages so far and from the time that the caller passes in.

No clock, no randomness, no threads, no tensors. There is no prefill and no decode here: each sequence has
`num_computed_tokens`, and every step's token budget lets it catch up with `num_tokens`. Chunked prompts, prefix-cache
hits and recomputing after a preemption all follow from that. Driven by the engine, and by a simulator in the tests.
"""

from bisect import insort
from operator import attrgetter

from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.messages import AddVersion, ForgetVersion, ReadDone
from guanaco.adapters.residency.moves import Move, Moves
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.loading_queue import LoadingQueue
from guanaco.server.engine.request import (
    Abort,
    FinishReason,
    Limits,
    Message,
    Request,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    Status,
    StepCounts,
    Submit,
    TokenOutput,
)
from guanaco.server.engine.speculation.step_drafts import Drafting, add_drafts
from guanaco.server.engine.step_share import StepShare
from guanaco.server.engine.stops import End, end_of, output_of
from guanaco.server.engine.turns import LAST, Turns

# A request that finds no adapter slot lets younger ones start before it. After this many such steps, no other request
# that needs a slot starts before it.
MAX_PASSED_OVER_STEPS = 32
_by_arrival = attrgetter("arrival_number")


class Scheduler:
    """Owns every unfinished sequence. `waiting` and `running` are both in order of arrival. A sequence whose adapters
    are not in host memory is in `loading` first; from then to its end it keeps its adapters in host memory.

    `turns` decides which sequence is admitted first and preempted last: adapters take turns, and the sequences of one
    adapter go in order of arrival. The oldest running sequence is never preempted, so every sequence finishes at last.
    """

    def __init__(
        self, limits: Limits, blocks: BlockManager, residency: ResidencyLedger, eos_ids: frozenset[int]
    ) -> None:
        assert limits.max_num_batched_tokens >= limits.max_num_seqs, "every running sequence must get its next token"
        assert limits.max_model_len <= blocks.num_blocks * blocks.block_size, "one sequence must fit"
        self.limits = limits
        self.blocks = blocks
        self.residency = residency
        self.loading = LoadingQueue(residency, limits.adapter_timeout_seconds)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_waiting_tokens = 0  # of all waiting sequences; counted here, since other threads read it
        self.counts = StepCounts()
        self.turns = Turns()
        self.drafting: Drafting | None = None  # None: no sequence has drafts
        self.was_for_newcomers = False  # the last step computed newcomers' prompts only, and decoding sequences waited
        self._eos_ids = eos_ids
        self._sequences: dict[str, Sequence] = {}  # by request id: all that load, wait or run
        self._num_arrived = self._num_turns = 0
        self._outputs: list[TokenOutput] = []  # of requests that ended outside of `update`, which returns them next
        self._moves: list[Move] = []  # what the next of `handle`, `schedule` and `update` returns

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._outputs)

    def handle(self, *messages: Message) -> tuple[tuple[bool, ...], Moves]:
        """Handle messages in order, then give the room that they freed to requests that wait for adapters.

        Returns an answer for each message (False for an AddVersion that found no room, else True) and the moves of
        adapters. Raises ValueError for a request that could never fit.
        """
        answers = tuple(self._handle(message) for message in messages)
        self.admit_loaded()
        return answers, self._take_moves()

    def _handle(self, message: Message) -> bool:
        match message:
            case Submit(request):
                self.add(request)
            case Abort(request_id):
                self.abort(request_id)
            case AddVersion():
                added, moves = self.residency.add_version(message)
                self._moves += moves
                return added
            case ForgetVersion(version):
                self._moves += self.residency.forget(version)
            case ReadDone(version, error):
                self.adapter_read(version, error)
        return True

    def _take_moves(self) -> Moves:
        moves, self._moves = tuple(self._moves), []
        return moves

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError for one that could never run: it would block the queue for ever."""
        self.check_fits(request)
        assert request.request_id not in self._sequences, "request ids are unique among those that are open"
        sequence = Sequence(request, list(request.prompt_token_ids), self._num_arrived, self.turns.num_steps)
        self._num_arrived += 1
        self._sequences[request.request_id] = sequence
        if request.loras:
            self.residency.enter(sequence.versions)
            self.loading.add(sequence)
        else:
            self._wait(sequence)

    def check_fits(self, request: Request) -> None:
        """Raise ValueError for a request that could never run; the message has the numbers."""
        length, limit = len(request.prompt_token_ids), self.limits.max_model_len
        if length == 0:
            raise ValueError("the prompt has no tokens")
        rows = self.limits.num_rows
        if rows is not None and not 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < rows:
            raise ValueError(f"the prompt has a token id that the model's {rows} embedding rows do not hold")
        if length + (request.params.max_tokens > 0) > limit:
            raise ValueError(f"the prompt has {length} tokens, and a context of {limit} must hold it and one more")
        self.residency.check_fits(request.versions)

    def abort(self, request_id: str) -> None:
        """End a request now, wherever it is. An unknown id does nothing: the request may just have finished."""
        if (sequence := self._sequences.get(request_id)) is not None:
            self._end(sequence, FinishReason.ABORT)

    def adapter_read(self, version: str, error: ErrorCode | None) -> None:
        """Record that a version's read has ended. error: the read failed, and the requests that wait for the version
        end with this error."""
        self._moves += self.residency.read_done(version, is_here=error is None)
        if error is not None:
            for sequence in [s for s in self.loading.sequences if s.holds_adapters and version in s.versions]:
                self._end(sequence, FinishReason.ERROR, error=error)

    def schedule(self, now: float) -> ScheduledBatch:
        """Decide one step at monotonic time `now` (seconds). The batch may be empty."""
        self.counts = StepCounts()
        self.turns.begin_step(self._sequences.values())
        self._expire(now)
        self.admit_loaded(is_step=True)
        chosen: dict[int, ScheduledSequence] = {}  # by arrival number
        turns = self._in_turn()
        floods = self.turns.floods(self.limits.flood_num_seqs)
        if floods and not self.was_for_newcomers:
            share = StepShare(self.limits, floods)
            share.limit_prompts()
            self._schedule_prompts(self.turns.newcomers(turns, floods), chosen, share, now)
        self.was_for_newcomers = bool(chosen)
        if not chosen:
            share = StepShare(self.limits, floods)
            self._schedule_decoding(chosen, share)
            if others_decode := bool(chosen):
                share.limit_prompts()
            self._schedule_prompts(turns, chosen, share, now)
            if floods and others_decode:
                self._schedule_decoding(chosen, share, leave_room=False)
        if self.drafting is not None and not self.was_for_newcomers:
            add_drafts(self.drafting, chosen, share, self.blocks, len(self.running), self.limits.max_model_len)
        for item in chosen.values():
            self._num_turns += 1
            item.sequence.last_turn = self._num_turns
        adapter_slots = self.residency.slots_of(v for item in chosen.values() for v in item.sequence.versions)
        self._moves += self.residency.step_moves()
        return ScheduledBatch(tuple(chosen.values()), adapter_slots, self._take_moves())

    def update(self, batch: ScheduledBatch, sampled: tuple[SampledToken, ...]) -> tuple[tuple[TokenOutput, ...], Moves]:
        """Apply the step's results, one for each sequence of the batch. Returns the outputs, with those of requests
        that ended otherwise since the last call, and the moves of adapters."""
        assert len(batch.sequences) == len(sampled)
        outputs, self._outputs = self._outputs, []
        for item, token in zip(batch.sequences, sampled, strict=True):
            if item.sequence.status is Status.RUNNING:  # it did not end between schedule and update
                outputs += self._enter(item, token)
        outputs += self._outputs
        self._outputs = []
        self.admit_loaded()  # the sequences that ended have left room for adapters
        return tuple(outputs), self._take_moves()

    def _enter(self, item: ScheduledSequence, token: SampledToken) -> list[TokenOutput]:
        """Apply one sequence's results. Returns its outputs, one for each token that was sampled or scored."""
        sequence, outputs, num_new = item.sequence, [], item.num_new_tokens
        for drawn in (token, *token.more):
            if drawn.error is not None:
                self._end(sequence, FinishReason.ERROR, error=drawn.error)
                break
            sequence.num_computed_tokens += num_new
            num_new = 1  # the draft token before each further one was right: it is computed
            self.blocks.commit(sequence)
            sequence.num_prompt_logprobs += len(drawn.prompt_logprobs)
            if item.needs_sample or drawn.prompt_logprobs or sequence.is_all_scored:
                outputs.append(self._advance(sequence, drawn))
            if sequence.status is Status.FINISHED:
                break
        if item.draft:
            self.counts.add_draft(item, max(0, len(outputs) - 1))
            if sequence.status is Status.RUNNING:
                self.blocks.trim(sequence, sequence.num_tokens)
        return outputs

    def _advance(self, sequence: Sequence, token: SampledToken) -> TokenOutput:
        """Append the sampled token, if there is one, and end the sequence if nothing follows it."""
        end: End | None = None
        if token.token_id is not None:
            sequence.token_ids.append(token.token_id)
            end = end_of(sequence, token.token_id, self._eos_ids, self.limits.max_model_len)
        elif sequence.is_all_scored:
            end = End(FinishReason.LENGTH)
        if end is not None:
            self._release(sequence, end.reason)
        return output_of(sequence, token, end)

    def admit_loaded(self, *, is_step: bool = False) -> None:
        """Let sequences whose adapters are in host memory wait for their turn, and start reads for which there is room.
        is_step: as in `LoadingQueue.take_ready`."""
        ready, moves = self.loading.take_ready(is_step=is_step)
        self._moves += moves
        for sequence in ready:
            self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_by_arrival)
        self.num_waiting_tokens += sequence.num_tokens

    def _expire(self, now: float) -> None:
        """End the requests that have waited too long. A preempted sequence does not count: it ran already."""
        for sequence in self.loading.late(now):
            self._end(sequence, FinishReason.ERROR, error=ErrorCode.ADAPTER_TIMEOUT)
        limit = self.limits.queue_timeout_seconds
        late = []
        for sequence in self.waiting:
            if sequence.num_preemptions:
                continue
            if not limit or now - sequence.request.arrival_seconds <= limit:
                break  # the sequences behind it came later
            late.append(sequence)
        for sequence in late:
            self._end(sequence, FinishReason.ERROR, error=ErrorCode.QUEUE_TIMEOUT)

    def _schedule_decoding(
        self, chosen: dict[int, ScheduledSequence], share: StepShare, *, leave_room: bool = True
    ) -> None:
        """Schedule one token for each decoding sequence. Called before prompts, so that no prompt makes them wait.

        leave_room: leave a part of the floods' tokens to the floods' prompts. After the prompts the method is called
        again without it, to hand out the tokens that they left.
        """
        rest = [sequence for sequence in self.running if sequence.arrival_number not in chosen]
        for sequence in share.decoding_in_turn(rest):
            if sequence.status is not Status.RUNNING or not share.has_turn(sequence, leave_room=leave_room):
                continue
            if self._make_room(sequence, 1, chosen):
                chosen[sequence.arrival_number] = ScheduledSequence(sequence, 1, sequence.generates)
                share.take_decoding(sequence)

    def _make_room(self, sequence: Sequence, num_new: int, chosen: dict[int, ScheduledSequence]) -> bool:
        """Give a sequence blocks for its next `num_new` positions; if too few are free, preempt others. Returns False
        if it gets none in this step."""
        while not self.blocks.allocate(sequence, sequence.num_computed_tokens + num_new):
            victim = self.turns.put_out_first(self.running)[1]
            if victim is self.running[0]:
                # It runs alone, and one sequence always fits. Only a fault of the block manager ends up here.
                return False
            chosen.pop(victim.arrival_number, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _schedule_prompts(
        self, turns: list[tuple[int, Sequence]], chosen: dict[int, ScheduledSequence], share: StepShare, now: float
    ) -> None:
        """Schedule prompts of running sequences, and of waiting ones that find room, in the order of `turns`.

        A sequence that finds no slot for its adapters lets others start before it. After MAX_PASSED_OVER_STEPS such
        steps, no sequence with adapters starts before it.
        """
        # Admitting never frees an adapter slot: a sequence whose adapters found none need not look again in this step.
        refused: set[tuple[str, ...]] = set()
        reserved = False  # a sequence has waited too long for a slot: no other one with adapters starts before it
        full_for = LAST + 1  # a sequence of this rank or a higher one finds no place or no blocks
        prompts = []
        for rank, sequence in turns:
            if share.for_prompt(sequence) <= 0:
                continue
            versions = sequence.versions
            if sequence.status is Status.WAITING:
                # After a preemption no sequence starts: the one that was just preempted would come straight back.
                if rank >= full_for or self.counts.num_preempted or (versions and reserved):
                    continue
                if versions in refused or (versions and not self.residency.can_place(versions)):
                    refused.add(versions)
                    sequence.num_passed_over += 1
                    reserved = sequence.num_passed_over > MAX_PASSED_OVER_STEPS
                    continue
                if not self._admit_in_turn(sequence, rank, chosen):
                    full_for = rank
                    continue
                if sequence.queue_seconds is None:
                    sequence.queue_seconds = now - sequence.request.arrival_seconds
            num_new = min(share.for_prompt(sequence), sequence.num_tokens - sequence.num_computed_tokens)
            if self._make_room(sequence, num_new, chosen):
                chosen[sequence.arrival_number] = ScheduledSequence(sequence, num_new, sequence.draws_after(num_new))
                prompts.append(sequence)
                share.take_prompt(sequence, num_new)
        for sequence in prompts:
            if sequence.arrival_number in chosen:  # it was not preempted again
                self.turns.serve(sequence)

    def _in_turn(self) -> list[tuple[int, Sequence]]:
        """(rank, sequence) of all prompts that run or wait, in the order of their turns. Background requests come last,
        until they were passed over in MAX_PASSED_OVER_STEPS steps."""
        last = [s for s in self.waiting if s.request.background and s.num_passed_over <= MAX_PASSED_OVER_STEPS]
        for sequence in last:
            sequence.num_passed_over += not self.counts.num_preempted
        return self.turns.in_order(self.running, self.waiting, last)

    def _admit_in_turn(self, sequence: Sequence, rank: int, chosen: dict[int, ScheduledSequence]) -> bool:
        """Start a sequence of rank `rank`. If it finds no room, preempt running ones of a higher rank: their adapters
        have more requests. Returns whether it started."""
        while len(self.running) >= self.limits.max_num_seqs or not self._admit(sequence):
            if not self.running:
                return False
            other_rank, other = self.turns.put_out_first(self.running)
            if other_rank <= rank:
                return False
            chosen.pop(other.arrival_number, None)
            self._preempt(other)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Start a sequence if there are blocks for all of its tokens, for one more, and one block for each running
        sequence: with fewer, one of them would soon be preempted. Otherwise return False and change nothing."""
        prefix = self.blocks.find_prefix(sequence)
        self.blocks.take_prefix(sequence, prefix)
        num_tokens = min(sequence.num_tokens + 1, self.limits.max_model_len)
        spare = self.blocks.num_free_blocks - self.blocks.num_missing_blocks(sequence, num_tokens)
        if spare < len(self.running) or not self.blocks.allocate(sequence, num_tokens):
            self.blocks.free(sequence)
            return False
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counts.prefix_queries_tokens += sequence.num_tokens
            self.counts.prefix_hits_tokens += sequence.num_computed_tokens
        if sequence.versions:
            has_place = self.residency.place(sequence.versions)
            assert has_place, "planned a moment ago"
        self._leave_queue(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_by_arrival)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks and adapter slots. It returns to its place in the queue and is computed again."""
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_preemptions += 1
        self._wait(sequence)
        self.counts.num_preempted += 1

    def _end(self, sequence: Sequence, reason: FinishReason, error: ErrorCode | None = None) -> None:
        self._release(sequence, reason)
        output = TokenOutput(sequence.request.request_id, (), finish_reason=reason, error=error)
        self._outputs.append(output)

    def _release(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take an ending sequence out of the scheduler and free all that it holds. Every end comes through here."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.status is Status.LOADING:
            self.loading.remove(sequence)
        else:
            self._leave_queue(sequence)
        if sequence.versions:
            self._moves += self.residency.leave(sequence.versions, holds=sequence.holds_adapters)
        del self._sequences[sequence.request.request_id]
        if self.drafting is not None:
            self.drafting.forget(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def _leave_queue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.num_waiting_tokens -= sequence.num_tokens

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.request.loras:
            self.residency.unplace(sequence.versions)
