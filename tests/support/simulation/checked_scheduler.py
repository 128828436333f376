"""The scheduler, with each of its decisions checked: limits, whose turn it is, who may wait and for how long.

A part of `simulator`.
"""

from collections import Counter

from guanaco.server.engine.request import Request, ScheduledBatch, ScheduledSequence, Sequence, Status
from guanaco.server.engine.scheduler import MAX_PASSED_OVER_STEPS, Scheduler
from guanaco.server.engine.step_share import PREFILL_SHARE_WHILE_DECODING, StepShare
from guanaco.server.engine.turns import LAST
from support.simulation.simulated_world import SeededFaults


class CheckedScheduler(Scheduler):
    """The scheduler, with each of its decisions checked against its limits, and against whose turn it is.

    `faults` make it preempt a sequence without need at times: that is within its rights, and others must cope.
    """

    def __init__(self, *args: object, faults: SeededFaults) -> None:
        super().__init__(*args)
        self._faults = faults
        self.num_steps = self.num_overtaken = self.num_newcomers = self.num_limited = 0
        self.last_computed: dict[int, int] = {}  # arrival number → step
        self.last_served: dict[tuple[str, ...], int] = {}
        self.arrived_before: dict[int, int] = {}  # arrival number → steps so far
        self.turns_before: dict[int, tuple[int, int, bool, int]] = {}
        self.ranks_before: dict[int, int] = {}
        self.preemptions_before: dict[int, int] = {}
        self.floods_before: set[tuple[str, ...]] = set()
        self.is_flood_served = False
        self.num_passes = 0  # over prompts, in this step: one for newcomers, one for all

    def add(self, request: Request) -> None:
        self.arrived_before[self._num_arrived] = self.num_steps
        super().add(request)

    def schedule(self, now: float) -> ScheduledBatch:
        before = list(self.running)
        decoding = [s for s in before if s.num_tokens - s.num_computed_tokens == 1]
        others_waited = self.was_for_newcomers
        self.num_passes = 0
        batch = super().schedule(now)
        self.num_steps += 1
        for item in batch.sequences:
            if item.sequence not in decoding:
                self.last_served[item.sequence.versions] = self.num_steps
        self._check_limits(batch)
        self.is_flood_served = self._is_flood_served(batch, decoding)
        self._check_order(before, self.turns_before)
        scheduled = {item.sequence for item in batch.sequences}
        if not scheduled.isdisjoint(decoding):
            num_prompt_tokens = sum(item.num_new_tokens for item in batch.sequences if item.sequence not in decoding)
            share = max(1, int(self.limits.max_num_batched_tokens * PREFILL_SHARE_WHILE_DECODING))
            assert num_prompt_tokens <= share, "prompts take more than their share while others decode"
        starved = [s for s in decoding if s.status is Status.RUNNING and s not in scheduled]
        if self.was_for_newcomers:
            self._check_newcomers(batch)
            assert not others_waited, "those who decode waited twice"
        else:
            if self.limits.flood_step_tokens:
                self._check_floods(batch, decoding, [s for s in starved if s.versions in self.floods_before])
                starved = [s for s in starved if s.versions not in self.floods_before]
            assert not starved or starved == before[:1], "a running sequence did not get its next token"
        self.last_computed.update({item.sequence.arrival_number: self.num_steps for item in batch.sequences})
        return batch

    def _in_turn(self) -> list[tuple[int, Sequence]]:
        """Called once a step, before anything is handed out."""
        if len(self.running) > 1 and self._faults.preempt_now():
            self._preempt(self.turns.put_out_first(self.running)[1])
        return super()._in_turn()

    def _check_floods(self, batch: ScheduledBatch, decoding: list[Sequence], starved: list[Sequence]) -> None:
        """They have their part of the step, all of it while they can use it, and each of them in turn."""
        of_floods = [item for item in batch.sequences if item.sequence.versions in self.floods_before]
        num_tokens, limit = sum(item.num_rows for item in of_floods), self.limits.flood_step_tokens
        assert num_tokens <= limit, "a flood takes more than its part"
        if not starved or self.counts.num_preempted or self._faults.num_fired:
            return
        self.num_limited += 1
        assert num_tokens == limit, "a flood waits without need"
        got = [self.last_computed[i.sequence.arrival_number] for i in of_floods if i.sequence in decoding]
        longest = min(self.last_computed[s.arrival_number] for s in starved)
        assert all(last <= longest for last in got), "one of a flood waits while others get their second token"

    def _is_flood_served(self, batch: ScheduledBatch, decoding: list[Sequence]) -> bool:
        """Whether floods have all of their part of this step, and their prompts all that is theirs of it; or others
        went first, or somebody had a share before it was put out."""
        if (
            self.was_for_newcomers
            or self.num_passes > 1
            or (self.limits.flood_step_tokens and self.counts.num_preempted)
        ):
            return True
        of_floods = [item for item in batch.sequences if item.sequence.versions in self.floods_before]
        of_prompts = sum(item.num_new_tokens for item in of_floods if item.sequence not in decoding)
        limit = self.limits.flood_step_tokens
        is_all = sum(item.num_new_tokens for item in of_floods) == limit
        return limit > 0 and is_all and of_prompts >= int(limit * PREFILL_SHARE_WHILE_DECODING)

    def _check_newcomers(self, batch: ScheduledBatch) -> None:
        """A step without those who decode: only while one adapter has many, and for the first of the others."""
        self.num_newcomers += 1
        floods = self.floods_before
        assert floods, "others' steps are put off without need"
        assert all(item.sequence.versions not in floods for item in batch.sequences)
        assert batch.num_tokens <= max(1, int(self.limits.max_num_batched_tokens * PREFILL_SHARE_WHILE_DECODING))
        assert all(self.ranks_before[item.sequence.arrival_number] == 0 for item in batch.sequences)

    def _check_limits(self, batch: ScheduledBatch) -> None:
        limits, items = self.limits, batch.sequences
        assert batch.num_tokens <= limits.max_num_batched_tokens, "token budget"
        assert len(self.running) <= limits.max_num_seqs, "too many run"
        assert len({id(item.sequence) for item in items}) == len(items), "a sequence is twice in a batch"
        assert len(set(batch.adapter_slots.values())) == len(batch.adapter_slots) <= self.residency.slots.num_slots
        for item in items:
            sequence = item.sequence
            assert sequence.status is Status.RUNNING
            missing = sequence.num_tokens - sequence.num_computed_tokens
            assert 1 <= item.num_new_tokens <= missing
            generates = sequence.request.params.max_tokens > 0
            assert item.needs_sample == (generates and item.num_new_tokens == missing)
            room = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed_tokens + item.num_rows <= room, "tokens without a block"
            if item.draft:
                assert (item.needs_sample, item.num_new_tokens) == (True, 1), "a draft for one that does not decode"
                left = sequence.request.params.max_tokens - sequence.num_output_tokens
                assert len(item.draft) < left, "a draft beyond max_tokens"
                assert sequence.num_tokens + len(item.draft) < limits.max_model_len, "a draft beyond the context"
        drafted = {item.sequence: len(item.draft) for item in items}
        for sequence in self.running:
            most = min(sequence.num_tokens + drafted.get(sequence, 0) + 1, limits.max_model_len)
            assert len(sequence.block_table) <= -(-most // self.blocks.block_size), "a sequence holds too many blocks"
            for lora in sequence.request.loras:
                assert self.residency.slots.num_pins(lora.version) > 0, "a running sequence's adapter is not pinned"

    def _schedule_prompts(
        self, turns: list[tuple[int, Sequence]], chosen: dict[int, ScheduledSequence], share: StepShare, now: float
    ) -> None:
        """Remember whose turn it is, by arrival number: worked out as `turns` says, by counting."""
        everybody, self.turns_before, self.ranks_before = [*self.running, *self.waiting], {}, {}
        before: list[tuple[str, ...]] = []
        prompts: list[tuple[str, ...]] = []
        for sequence in everybody:
            self.ranks_before[sequence.arrival_number] = before.count(sequence.versions)
            self.preemptions_before[sequence.arrival_number] = sequence.num_preemptions
            before.append(sequence.versions)
            rank = prompts.count(sequence.versions)
            if sequence.status is Status.WAITING or sequence.num_tokens - sequence.num_computed_tokens > 1:
                prompts.append(sequence.versions)
            came = self.arrived_before[sequence.arrival_number]
            served = self.last_served.get(sequence.versions, 0)
            turn = (rank, served, True) if served > came else (rank, came, False)
            self.turns_before[sequence.arrival_number] = (*turn, sequence.arrival_number)
        self.num_passes += bool(turns)
        counts = Counter(before)
        self.floods_before = {key for key, count in counts.items() if count >= self.limits.flood_num_seqs}
        super()._schedule_prompts(turns, chosen, share, now)

    def _check_order(self, before: list[Sequence], turns: dict[int, tuple[int, int, bool, int]]) -> None:
        """Whose turn it is starts, but for those without a slot; whose turn is last is put out; never the oldest."""
        for queue in (self.running, self.waiting, self.loading.sequences):
            numbers = [s.arrival_number for s in queue]
            assert numbers == sorted(numbers), "out of order"
        preempted = [s for s in before if s.status is Status.WAITING]
        stayed = [s for s in before if s.status is Status.RUNNING]
        if preempted:
            assert before[0].status is Status.RUNNING, "the oldest was preempted"
            ranks = {s.arrival_number: sum(o.versions == s.versions for o in before[:i]) for i, s in enumerate(before)}
            first = min((ranks[s.arrival_number], s.arrival_number) for s in preempted)
            assert all((ranks[s.arrival_number], s.arrival_number) < first for s in stayed), "put out before its turn"
        known = set(before)
        admitted = [s for s in self.running if s not in known and not s.request.background]
        for sequence in self.waiting:
            if sequence in known or sequence.arrival_number not in turns or sequence.request.background:
                continue
            if sequence.versions in self.floods_before and self.is_flood_served:
                continue
            if sequence.num_preemptions > self.preemptions_before[sequence.arrival_number]:
                continue  # it was let in, and put out again for one of a lower rank
            rank, ranks = self.ranks_before[sequence.arrival_number], self.ranks_before
            after = [s for s in admitted if turns.get(s.arrival_number, (LAST,)) > turns[sequence.arrival_number]]
            after = [s for s in after if ranks.get(s.arrival_number, LAST) >= rank]
            if after:
                assert sequence.request.loras, "a base request was overtaken"
                with_adapters = [s for s in after if s.request.loras]
                assert not with_adapters or sequence.num_passed_over <= MAX_PASSED_OVER_STEPS, "overtaken for too long"
                self.num_overtaken += 1
