"""A seeded world around the engine: clients that come, leave and check every token, adapters that come and go, faults
far denser than in life, and the invariants of the scheduler, the block ledger, the prefix cache, the adapter slots and
the host's memory after each step.

Time is a number, chance is a seed: a failure is `Simulation(seed)` again. Runs on `fake_runner`, without torch.
"""

import logging
from collections import Counter
from random import Random

from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.loading_queue import MAX_STEPS_WITHOUT_ROOM
from guanaco.server.engine.request import (
    Abort,
    BlockContent,
    FinishReason,
    Limits,
    LoraRef,
    Request,
    SamplingParams,
    Status,
    Submit,
    TokenOutput,
)
from guanaco.server.engine.scheduler import MAX_PASSED_OVER_STEPS
from support.simulation.checked_scheduler import CheckedScheduler
from support.simulation.fake_runner import namespace_number, namespace_of_request, next_state, next_token
from support.simulation.simulated_adapters import BROKEN, SimulatedAdapters
from support.simulation.simulated_drafts import SimulatedDrafts
from support.simulation.simulated_world import Client, FaultyBlocks, LedgerRunner, Report, SeededFaults, World

EOS_ID, STOP_ID = 0, 1
FULL_CHECK_EVERY = 8  # steps between two checks of everything that is held and cached


class Simulation:
    """One world from its seed: `run` for so many steps, then `finish` to quiescence."""

    def __init__(self, seed: int, world: World | None = None) -> None:
        self.world = world = world or World.of_seed(seed)
        self.random = Random(seed)
        self.now = 0.0
        self.report = Report()
        self.faults = SeededFaults(self.random, world.fault_chance)
        self.runner = LedgerRunner(world.num_blocks, world.block_size, world.num_slots, world.vocab_size)
        self.blocks = FaultyBlocks(world.num_blocks, world.block_size, self.faults)
        self.runner.blocks = self.blocks
        self.slots = SlotTable(world.num_slots, world.arena_bytes)
        self.runner.table, self.runner.arena = self.slots, [None] * world.arena_bytes
        limits = Limits(
            max_num_seqs=world.max_num_seqs,
            max_num_batched_tokens=world.max_num_batched_tokens,
            max_model_len=world.max_model_len,
            queue_timeout_seconds=world.queue_timeout_seconds,
            adapter_timeout_seconds=world.adapter_timeout_seconds,
            flood_num_seqs=world.flood_num_seqs,
            flood_step_tokens=world.flood_step_tokens,
        )
        self.host = HostTable(world.host_room)
        self.scheduler = CheckedScheduler(
            limits, self.blocks, ResidencyLedger(self.slots, self.host), frozenset({EOS_ID}), faults=self.faults
        )
        self.engine = Engine(self.scheduler, self.runner, clock=lambda: self.now)
        self.clients: dict[str, Client] = {}  # open ones
        if world.draft_chance:
            chances = Random(f"drafts {seed}")
            self.scheduler.drafting = SimulatedDrafts(chances, world.draft_chance, world.vocab_size, self._will_come)
        self.adapters = SimulatedAdapters(
            self.random,
            self.scheduler,
            world.num_adapters,
            room=world.host_room,
            fault_chance=world.fault_chance,
            is_used=lambda version: any(version in client.request.versions for client in self.clients.values()),
        )
        self.runner.adapters = self.engine.source = self.adapters
        self._states: dict[BlockContent, list[int]] = {}  # what the runner must have written for it
        self._num_made = self._num_submitted = 0
        self._prompts: list[tuple[int, ...]] = [self._fresh_tokens() for _ in range(3)]

    # what a world does

    def run(self, num_steps: int) -> Report:
        for _ in range(num_steps):
            self._happen()
            self.step()
        return self.report

    def finish(self) -> Report:
        """Let everything end, and check that nothing is left."""
        self.faults.chance = self.adapters.fault_chance = 0.0
        self.adapters.keeps = False
        self.adapters.keep(self.engine, frozenset())
        each = self.world.max_model_len * 4 + MAX_PASSED_OVER_STEPS + MAX_STEPS_WITHOUT_ROOM
        most = self.report.num_steps + 400 + len(self.clients) * each
        while self.engine.has_work or self.scheduler.loading.sequences:
            self.adapters.happen(self.engine)
            self.step()
            assert self.report.num_steps < most, "the last requests do not end"
        assert not self.clients, "a request never ended"
        self.check()
        self.report.counts += self.adapters.counts
        self.report.counts["overtaken"] = self.scheduler.num_overtaken
        self.report.counts["steps for newcomers"] = self.scheduler.num_newcomers
        self.report.counts["a flood waited its turn"] = self.scheduler.num_limited
        assert self.blocks.num_free_blocks == self.world.num_blocks
        assert not self.scheduler.waiting
        assert not self.scheduler.running
        assert not self.scheduler._sequences
        if isinstance(self.scheduler.drafting, SimulatedDrafts):
            self.scheduler.drafting.check_all_forgotten()
        assert not any(self.host.num_pins(version) for version in self.host._sizes)
        assert self.scheduler.num_waiting_tokens == 0
        assert all(self.slots.num_pins(version) == 0 for version in self.slots.resident)
        ended = self.report.counts
        assert self._num_submitted == sum(ended[f"ended {reason}"] for reason in FinishReason) + ended["refused"]
        return self.report

    def _happen(self) -> None:
        """What comes from outside between two steps."""
        random, world = self.random, self.world
        self.now += random.random() * 2
        while random.random() < world.submit_chance and len(self.clients) < world.max_open:
            self.submit(self.random_request())
        if self.clients and random.random() < world.abort_chance:
            self.abort(random.choice(list(self.clients)))
        if random.random() < world.fault_chance:
            self._fault()
        self.adapters.happen(self.engine)

    def _fault(self) -> None:
        kind, runner = self.random.randrange(7), self.runner.faults
        victim = self.random.choice(list(self.clients)) if self.clients else None
        if kind == 0:
            self.blocks.evict_cached()
        elif kind == 1 and victim:
            runner.nan_ids.add(victim)
        elif kind == 2 and victim:
            runner.raising_ids.add(victim)
        elif kind == 3:
            runner.num_raising_runs = 1  # passes at the second try
        elif kind == 4:
            runner.num_failing_loads = 1
        elif kind == 5:
            runner.max_tokens = self.random.randint(1, 8)
        else:
            runner.max_tokens = None
            self.now += self.random.choice((0.0, 0.0, 20.0, 3600.0))

    def _fresh_tokens(self) -> tuple[int, ...]:
        length = self.random.randint(1, self.world.max_model_len - 2)
        return tuple(self.random.randrange(self.world.vocab_size) for _ in range(length))

    def random_request(self) -> Request:
        """A request that likely shares a prefix with others, under one of few adapters and tenants."""
        random, world = self.random, self.world
        if random.random() < 0.05:
            self._prompts[random.randrange(len(self._prompts))] = self._fresh_tokens()
        prompt = random.choice(self._prompts)
        prompt = prompt[: random.randint(1, len(prompt))]
        if random.random() < 0.3:
            prompt = (*prompt, random.randrange(world.vocab_size))
        adapters: tuple[LoraRef, ...] = ()
        if random.random() < 0.7:
            versions = sorted(set(self.adapters.versions))
            most = min(len(versions), world.num_slots + (random.random() < 0.02))  # rarely one too many
            chosen = random.sample(versions, min(most, random.choice((1, 1, 1, 2))))
            adapters = tuple(LoraRef(version, random.choice((1.0, 1.0, 0.5))) for version in chosen)
        self._num_made += 1
        params = SamplingParams(
            max_tokens=random.choice((0, 1, 5, 12, 30, 100)),
            seed=random.randrange(4),
            ignore_eos=random.random() < 0.5,
            min_tokens=random.choice((0, 0, 3)),
            stop_token_ids=frozenset({STOP_ID}) if random.random() < 0.3 else frozenset(),
            prompt_logprobs=0 if random.random() < 0.1 else None,
        )
        return Request(
            f"r{self._num_made}",
            prompt,
            params,
            loras=adapters,
            cache_salt=random.choice(("", "", "tenant")),
            arrival_seconds=self.now,
        )

    # one event each

    def submit(self, request: Request) -> bool:
        self._num_submitted += 1
        fits = len(request.prompt_token_ids) + (request.params.max_tokens > 0) <= self.world.max_model_len
        fits = fits and len(set(request.versions)) <= self.world.num_slots
        fits = fits and self.adapters.fit_together(request.versions)
        try:
            self.engine.handle(Submit(request))
        except ValueError:
            assert not fits, "a request that fits was refused"
            self.report.counts["refused"] += 1
            return False
        assert fits, "a request that can never run was accepted"
        namespace, state = namespace_of_request(request), 0
        for token in request.prompt_token_ids:
            state = next_state(state, namespace, token)
        self.clients[request.request_id] = Client(request, namespace, state)
        return True

    def abort(self, request_id: str) -> None:
        self.clients[request_id].aborted = True
        self.engine.handle(Abort(request_id))

    def step(self) -> None:
        report = self.report
        report.num_steps += 1
        self.faults.num_fired = 0
        self.runner.failed_alone.clear()
        self.runner.failed_loads.clear()
        was_runnable = bool(self.scheduler.waiting or self.scheduler.running)
        finished = self.scheduler.running[:]
        output = self.engine.step()
        if self.runner.violation is not None:
            raise self.runner.violation
        stats = output.stats
        report.num_tokens += stats.num_scheduled_tokens
        if stats.num_preempted:
            report.counts["preempted"] += stats.num_preempted
        if stats.prefix_hits_tokens:
            report.counts["prefix hits"] += 1
        for outcome in stats.drafts:
            report.counts["draft tokens"] += outcome.num_drafted
            report.counts["draft tokens that stayed"] += outcome.num_accepted
        for item in output.outputs:
            self._take(item)
        for sequence in finished:
            if sequence.status is Status.FINISHED:
                self.runner.forget(sequence)
        if was_runnable and not stats.num_scheduled_tokens and not self.faults.num_fired:
            left = [*self.scheduler.waiting, *self.scheduler.running]
            assert not left, "there is work, and a step did nothing"
        for request_id, client in self.clients.items():
            assert not client.aborted, f"{request_id} was aborted, and a step later it is still there"
        self._check_loading()
        if report.num_steps % FULL_CHECK_EVERY == 0:
            self.check()

    def _will_come(self, request_id: str, count: int) -> list[int]:
        """The next tokens that a client will get, for drafts that are right."""
        client = self.clients[request_id]
        state, tokens = client.state, []
        for _ in range(count):
            tokens.append(next_token(state, client.request.params.seed or 0, self.world.vocab_size))
            state = next_state(state, client.namespace, tokens[-1])
        return tokens

    def _check_loading(self) -> None:
        """Whoever waits for adapters waits for something, and not for too long."""
        loading, limit = self.scheduler.loading.sequences, self.world.adapter_timeout_seconds
        assert all(not limit or self.now - s.request.arrival_seconds <= limit for s in loading), "waits for too long"
        if loading and not self.scheduler.waiting and not self.scheduler.running:
            # What an operator keeps may be in the way of a mixture, until it is let go.
            assert self.adapters.is_reading or self.host.kept, "requests wait for adapters that nobody reads"
        self.report.counts["loading"] += bool(loading)
        self.adapters.failed.clear()
        self.adapters.check(self.slots.resident)

    def _take(self, output: TokenOutput) -> None:
        """A client gets an output: is it the one that it must be?"""
        client = self.clients.get(output.request_id)
        assert client is not None, "an output after the end"
        params = client.request.params
        for found in output.prompt_logprobs:
            client.num_prompt_logprobs += 1
            assert found.token_id == client.request.prompt_token_ids[client.num_prompt_logprobs], "prompt logprobs"
        for token in output.token_ids:
            assert token == next_token(client.state, params.seed or 0, self.world.vocab_size), "a wrong token"
            client.state = next_state(client.state, client.namespace, token)
            client.num_tokens += 1
        if output.token_ids and params.prompt_logprobs is not None:
            assert client.num_prompt_logprobs == len(client.request.prompt_token_ids) - 1
        reason = self._reason(client, output)
        assert output.finish_reason is reason, f"finished as {output.finish_reason}, expected {reason}"
        if reason is not None:
            self.report.counts[f"ended {reason}"] += 1
            del self.clients[output.request_id]
            self.runner.faults.nan_ids.discard(output.request_id)
            self.runner.faults.raising_ids.discard(output.request_id)

    def _reason(self, client: Client, output: TokenOutput) -> FinishReason | None:
        """How the request must have ended with this output; None: not yet."""
        params = client.request.params
        if client.aborted:
            return FinishReason.ABORT
        if output.error is not None:
            assert self._is_to_fail(client, output.error), f"error {output.error}"
            return FinishReason.ERROR
        if params.max_tokens == 0:
            assert not output.token_ids, "tokens that nobody asked for"
            num_missing = len(client.request.prompt_token_ids) - 1 - client.num_prompt_logprobs
            is_scored = params.prompt_logprobs is None or not num_missing
            assert is_scored if output.finish_reason else output.prompt_logprobs, "scored in part, or an empty output"
            self.report.counts["scored"] += bool(output.finish_reason)
            return FinishReason.LENGTH if output.finish_reason else None
        if not output.token_ids:
            return None
        token = output.token_ids[-1]
        is_stop = token in params.stop_token_ids or (token == EOS_ID and not params.ignore_eos)
        if is_stop and client.num_tokens >= params.min_tokens:
            return FinishReason.STOP
        full = len(client.request.prompt_token_ids) + client.num_tokens >= self.world.max_model_len
        return FinishReason.LENGTH if full or client.num_tokens >= params.max_tokens else None

    def _is_to_fail(self, client: Client, error: str) -> bool:
        request, runner = client.request, self.runner
        if error == ErrorCode.QUEUE_TIMEOUT:
            return 0 < self.world.queue_timeout_seconds < self.now - request.arrival_seconds and not client.num_tokens
        if error == ErrorCode.ADAPTER_TIMEOUT:
            limit = self.world.adapter_timeout_seconds
            return 0 < limit < self.now - request.arrival_seconds and bool(request.loras) and not client.num_tokens
        if error == BROKEN:
            return not self.adapters.failed.isdisjoint(request.versions)
        if error == ErrorCode.ADAPTER_LOAD_FAILED:
            return not runner.failed_loads.isdisjoint(lora.version for lora in request.loras)
        if error == ErrorCode.INTERNAL_ERROR:
            return request.request_id in runner.failed_alone
        return error == "numerical_error" and request.request_id in runner.faults.nan_ids

    def check(self) -> None:
        """Everything that must hold between two steps, at the price of looking at all of it."""
        scheduler, blocks = self.scheduler, self.blocks
        blocks.check([*scheduler.running, *scheduler.waiting])
        scheduler.residency.check()
        assert all(not s.block_table and s.status is Status.WAITING for s in scheduler.waiting)
        assert all(s.status is Status.RUNNING for s in scheduler.running)
        everybody = [*scheduler.running, *scheduler.waiting, *scheduler.loading.sequences]
        assert {s.request.request_id for s in everybody} == set(scheduler._sequences)
        holds = Counter(version for s in everybody if s.holds_adapters for version in {*s.versions})
        assert holds == Counter({version: self.host.num_pins(version) for version in self.host._sizes} | holds)
        assert all(self.host.num_pins(version) == holds[version] for version in self.host._sizes)
        assert all(s.holds_adapters == bool(s.versions) for s in (*scheduler.running, *scheduler.waiting))
        assert scheduler.num_waiting_tokens == sum(s.num_tokens for s in scheduler.waiting)
        pins = Counter(version for s in scheduler.running for version in {lora.version for lora in s.request.loras})
        assert pins == Counter({version: self.slots.num_pins(version) for version in self.slots.resident} | pins)
        assert all(self.slots.num_pins(version) == pins[version] for version in self.slots.resident)
        for block in range(blocks.num_blocks):
            content = blocks.content_of(block)
            if content is not None:
                self._check_content(block, content)

    def _check_content(self, block: int, content: BlockContent) -> None:
        """A block that can be found holds what it is found by."""
        states = self._states.get(content)
        if states is None:
            if len(self._states) > 1000:
                self._states.clear()
            chain = [content]
            while chain[-1].parent is not None:
                chain.append(chain[-1].parent)
            salt, loras = content.namespace
            number, state = namespace_number(salt, loras), 0
            tokens = [token for link in reversed(chain) for token in link.token_ids]
            states = [state := next_state(state, number, token) for token in tokens][-self.world.block_size :]
            self._states[content] = states
        assert states == self.runner.memory[block], "a cached block does not hold its key"


def simulate(seed: int, num_steps: int) -> Report:
    """One world, to its end."""
    simulation = Simulation(seed)
    simulation.run(num_steps)
    return simulation.finish()


def simulate_many(seeds: range, num_steps: int) -> Report:
    """Worlds one after the other, their reports added up: one task of a pool of processes."""
    logging.getLogger("guanaco.server.engine.engine").disabled = True  # every injected fault is logged with its stack
    total = Report()
    for seed in seeds:
        try:
            report = simulate(seed, num_steps)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        total.num_steps += report.num_steps
        total.counts += report.counts
    return total
