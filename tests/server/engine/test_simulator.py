"""Checked steps of scheduler, block ledger, prefix cache and adapter slots, in worlds full of faults."""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context

import pytest

from guanaco.adapters.residency.host_table import HostTable
from guanaco.adapters.residency.ledger import ResidencyLedger
from guanaco.adapters.residency.moves import Moves, Read
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.server.engine import block_manager
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.loading_queue import LoadingQueue
from guanaco.server.engine.request import (
    LoraRef,
    Request,
    SampledToken,
    SamplingParams,
    ScheduledSequence,
    Sequence,
    Status,
)
from guanaco.server.engine.scheduler import Scheduler
from guanaco.server.engine.speculation import speculator
from guanaco.server.engine.step_share import StepShare
from guanaco.server.engine.turns import Turns
from support.children import environment
from support.simulation import fake_runner
from support.simulation.simulator import Simulation, World, simulate, simulate_many

STEPS_PER_WORLD = 400
SEEDS_PER_TASK = 50


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Every injected fault is logged with its stack."""
    logging.getLogger("guanaco.server.engine.engine").disabled = True


@pytest.mark.timeout(1800)
def test_checked_steps_in_worlds_full_of_faults(proof_count: Callable[[int, int], int]) -> None:
    """A quarter of a million; `make accept` runs five million.

    Each step is checked by the fake runner (every key and value that is read) and by the scheduler's own limits.
    Everything held and cached is checked every eighth step.
    """
    wanted, num_steps, counts = proof_count(250_000, 5_000_000), 0, Counter[str]()
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        first_seed = 0
        while num_steps < wanted:
            starts = range(first_seed, first_seed + 8 * workers * SEEDS_PER_TASK, SEEDS_PER_TASK)
            tasks = [range(start, start + SEEDS_PER_TASK) for start in starts]
            first_seed = starts.stop
            for report in pool.map(simulate_many, tasks, repeat(STEPS_PER_WORLD)):
                num_steps += report.num_steps
                counts += report.counts
    print(f"{num_steps} steps in {first_seed} worlds: {dict(counts)}")
    # What was to be tried did happen, and often.
    ends = ("ended stop", "ended length", "ended abort", "ended error", "refused")
    adapters = ("loading", "reads", "failed reads", "evictions", "no room", "removed or replaced", "forgotten", "kept")
    for event in (
        *ends,
        *adapters,
        "preempted",
        "overtaken",
        "steps for newcomers",
        "a flood waited its turn",
        "prefix hits",
        "draft tokens",
        "draft tokens that stayed",
    ):
        assert counts[event] > wanted // 10_000, event


def test_a_seed_is_a_world() -> None:
    """A failure can be run again: from its seed everything follows, in another process too."""
    here = repr(simulate(7, 300))
    program = (
        "import logging; logging.disable(50)\nfrom support.simulation.simulator import simulate as s; print(s(7, 300))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == here


# Planted bugs: the proof above is worth what it can find.

ROOT_CONTENT = block_manager.root_content


def _root_without(*forgotten: str) -> Callable[[Request], object]:
    """A prefix-cache key that leaves something out."""

    def root(request: Request) -> object:
        loras = request.loras
        if "adapter" in forgotten:
            loras = ()
        if "scale" in forgotten:
            loras = tuple(LoraRef(lora.version) for lora in loras)
        salt = "" if "salt" in forgotten else request.cache_salt
        return ROOT_CONTENT(Request(request.request_id, request.prompt_token_ids, request.params, loras, salt))

    return root


def _skipped_decref(self: BlockManager, sequence: Sequence, _original=BlockManager.free) -> None:
    if len(sequence.block_table) > 2:
        sequence.block_table.pop()
    _original(self, sequence)


def _double_free(self: BlockManager, sequence: Sequence, _original=BlockManager.free) -> None:
    table = list(sequence.block_table)
    _original(self, sequence)
    if len(table) > 2:
        sequence.block_table = table[:1]
        _original(self, sequence)


def _swapped_slots(self: SlotTable, _original=SlotTable.take_loads) -> tuple[tuple[int, str], ...]:
    loads = _original(self)
    return tuple(((slot + 1) % self.num_slots, version) for slot, version in loads)


def _forgotten_load(self: SlotTable, _original=SlotTable.take_loads) -> tuple[tuple[int, str], ...]:
    return _original(self)[:-1]


def _off_by_one(self: BlockManager, sequence: Sequence, num_tokens: int, _original=BlockManager.allocate) -> bool:
    return _original(self, sequence, num_tokens - 1)


def _commit_too_early(self: BlockManager, sequence: Sequence, _original=BlockManager.commit) -> None:
    computed = sequence.num_computed_tokens
    sequence.num_computed_tokens = len(sequence.block_table) * self.block_size
    sequence.num_computed_tokens = min(sequence.num_computed_tokens, sequence.num_tokens)
    _original(self, sequence)
    sequence.num_computed_tokens = computed


def _abort_forgets_the_queue(self: Scheduler, request_id: str, _original=Scheduler.abort) -> None:
    sequence = self._sequences.get(request_id)
    if sequence is not None and sequence.status is Status.RUNNING:
        _original(self, request_id)


def _claims_too_much(
    self: BlockManager, sequence: Sequence, blocks: list[int], _original=BlockManager.take_prefix
) -> None:
    _original(self, sequence, blocks)
    if blocks and sequence.num_computed_tokens + 1 < sequence.num_tokens:
        sequence.num_computed_tokens += 1


def _shares_the_last_block(self: BlockManager, sequence: Sequence, _original=BlockManager.find_prefix) -> list[int]:
    """A whole cached prompt is taken, its last token too: nothing is left to compute, or a shared block is written."""
    sequence.token_ids.append(0)
    blocks = _original(self, sequence)
    sequence.token_ids.pop()
    return blocks


def _evicts_what_is_held(self: SlotTable, versions, _original=SlotTable.unpin) -> None:
    for version in list(versions)[:1]:
        if self.num_pins(version) > 1:
            _original(self, [version])
    _original(self, versions)


def _lets_go_too_early(self: HostTable, versions, _original=HostTable.unpin) -> None:
    _original(self, versions)
    for version in list(versions)[:1]:
        if self.num_pins(version) > 1:
            _original(self, [version])


def _evicts_what_is_held_in_memory(self: HostTable, versions, _original=HostTable.pin) -> Moves | None:
    self._idle.update(dict.fromkeys(self._here))
    return _original(self, versions)


def _evicts_what_is_kept(self: HostTable, versions, _original=HostTable.pin) -> Moves | None:
    self._idle.update(dict.fromkeys(self._kept & self._here - self._pins.keys()))
    return _original(self, versions)


def _takes_half(self: HostTable, versions, _original=HostTable.pin) -> Moves | None:
    """Not all or nothing: what there is room for is held, and read."""
    parts = [_original(self, [version]) for version in dict.fromkeys(versions)]
    return None if None in parts else tuple(move for part in parts for move in part or ())


def _reads_for_everybody(self: HostTable, versions, _original=HostTable.pin) -> Moves | None:
    moves = _original(self, versions)
    again = (Read(version) for version in sorted(set(versions) & self._reading))
    return None if moves is None else tuple(dict.fromkeys((*moves, *again)))


def _removes_what_is_used(self: HostTable, version: str, _original=HostTable.evict) -> Moves | None:
    return _original(self, version) or ()


def _removes_from_memory_only(self: HostTable, version: str, *, _original=HostTable.evict) -> Moves | None:
    return None if _original(self, version) is None else ()


def _lies_over_others(self: SlotTable, missing, without, _original=SlotTable._lay_out):
    """First fit that forgets whoever was placed a moment ago, and the pinned ones with it."""
    return _original(self, missing, list(self._offsets)[:-1])


def _trusts_stale_bytes(self: SlotTable, versions, _original=SlotTable.pin):
    stored = list(self._stored)
    plan = _original(self, versions)
    self._stored = [new or old for new, old in zip(self._stored, stored, strict=True)]
    return plan


def _forgets_who_waits(self: Scheduler, version: str, error: str | None) -> None:
    self._moves += self.residency.read_done(version, is_here=error is None)


def _first_come(self: Turns, running, waiting, last, _original=Turns.in_order):
    return sorted(_original(self, running, waiting, last), key=lambda turn: turn[1].arrival_number)


def _prompts_first(self: Scheduler, chosen, share, *, leave_room=True, _original=Scheduler._schedule_decoding) -> None:
    """Prefill first, as engines of 2023 did it: whoever decodes waits while there are prompts."""
    if not any(s.num_tokens - s.num_computed_tokens > 1 for s in self.running):
        _original(self, chosen, share, leave_room=leave_room)


def _the_same_ones(self: StepShare, running, _original=StepShare.decoding_in_turn) -> list[Sequence]:
    """The oldest of a flood get all of its part."""
    return sorted(_original(self, running), key=lambda sequence: sequence.arrival_number)


def _rejected_tokens_stay(self: Scheduler, item: ScheduledSequence, token, _original=Scheduler._enter):
    """The keys of a whole draft count as computed, whatever was right."""
    outputs = _original(self, item, token)
    if item.draft and item.sequence.status is Status.RUNNING:
        item.sequence.num_computed_tokens = min(
            item.sequence.num_computed_tokens + len(item.draft) - len(token.more), item.sequence.num_tokens - 1
        ) + (len(token.more) < len(item.draft))
    return outputs


def _rejected_tokens_are_kept(draft: tuple[int, ...], drawn: Iterator[SampledToken]) -> SampledToken:
    """Every draft token stays."""
    rows = [next(drawn) for _ in range(len(draft) + 1)]
    return replace(rows[0], more=tuple(rows[1:]))


def _rejected_tokens_are_cached(self: Scheduler, item: ScheduledSequence, token, _original=Scheduler._enter):
    """A block is findable when the draft has filled it."""
    sequence = item.sequence
    outputs = _original(self, item, token)
    if item.draft and sequence.status is Status.RUNNING and len(sequence.block_table) * self.blocks.block_size:
        kept, computed = sequence.token_ids, sequence.num_computed_tokens
        sequence.token_ids = [*kept[: len(kept) - 1 - len(token.more)], token.token_id, *item.draft]
        room = len(sequence.block_table) * self.blocks.block_size
        sequence.num_computed_tokens = min(len(sequence.token_ids), room)
        self.blocks.commit(sequence)
        sequence.token_ids, sequence.num_computed_tokens = kept, computed
    return outputs


def _drafts_without_room(self: StepShare, sequence: Sequence) -> int:
    return 99


PLANTED = {
    "a rejected token's keys stay": (Scheduler, "_enter", _rejected_tokens_stay),
    "a rejected token is kept": (fake_runner, "verified", _rejected_tokens_are_kept),
    "a rejected token is cached as prefix": (Scheduler, "_enter", _rejected_tokens_are_cached),
    "another key's suffixes": (speculator, "namespace_of", lambda sequence: sequence.versions),
    "another version's suffixes": (speculator, "namespace_of", lambda sequence: sequence.request.cache_salt),
    "the blocks of a draft are kept": (BlockManager, "trim", lambda self, sequence, num_tokens: None),
    "drafts beyond the step's tokens": (StepShare, "for_draft", _drafts_without_room),
    "drafts that no flood is charged for": (StepShare, "take_draft", lambda self, sequence, num_tokens: None),
    "adapter missing from the prefix key": (block_manager, "root_content", _root_without("adapter")),
    "scale missing from the prefix key": (block_manager, "root_content", _root_without("scale")),
    "salt missing from the prefix key": (block_manager, "root_content", _root_without("salt")),
    "a skipped decref": (BlockManager, "free", _skipped_decref),
    "a double free": (BlockManager, "free", _double_free),
    "swapped adapter slots": (SlotTable, "take_loads", _swapped_slots),
    "a load that never happens": (SlotTable, "take_loads", _forgotten_load),
    "one block too few": (BlockManager, "allocate", _off_by_one),
    "a block is findable before it is computed": (BlockManager, "commit", _commit_too_early),
    "an abort that forgets the queue": (Scheduler, "abort", _abort_forgets_the_queue),
    "a prefix hit that claims too much": (BlockManager, "take_prefix", _claims_too_much),
    "the last block of a prompt is shared": (BlockManager, "find_prefix", _shares_the_last_block),
    "a pin too few": (SlotTable, "unpin", _evicts_what_is_held),
    "a broken digest that is trusted": (block_manager, "is_same_content", lambda *_: True),
    "a hold on host memory too few": (HostTable, "unpin", _lets_go_too_early),
    "a copy that is held is evicted": (HostTable, "pin", _evicts_what_is_held_in_memory),
    "what an operator keeps is evicted": (HostTable, "pin", _evicts_what_is_kept),
    "half of a mixture is held": (HostTable, "pin", _takes_half),
    "a read for each who waits": (HostTable, "pin", _reads_for_everybody),
    "a removal that does not wait": (HostTable, "evict", _removes_what_is_used),
    "a removed copy that stays": (HostTable, "evict", _removes_from_memory_only),
    "bytes of two adapters in one place": (SlotTable, "_lay_out", _lies_over_others),
    "bytes that another one had are trusted": (SlotTable, "pin", _trusts_stale_bytes),
    "out of memory, still on the device": (ResidencyLedger, "_off_slot", lambda *_: None),
    "a failed read that nobody hears of": (Scheduler, "adapter_read", _forgets_who_waits),
    "no deadline for those that load": (LoadingQueue, "late", lambda *_: []),
    "room that nobody is told of": (Scheduler, "admit_loaded", lambda self, *, is_step=False: None),
    "first come, first served": (Turns, "in_order", _first_come),
    "the youngest is put out": (Turns, "put_out_first", staticmethod(lambda running: (0, list(running)[-1]))),
    "no share for those that decode": (StepShare, "limit_prompts", lambda self: None),
    "a flood takes all": (StepShare, "take_decoding", lambda self, sequence: None),
    "always the same ones of a flood": (StepShare, "decoding_in_turn", _the_same_ones),
    "prompts first": (Scheduler, "_schedule_decoding", _prompts_first),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a few thousand steps, where the sound code passes a quarter of a million."""
    where, attribute, bug = PLANTED[name]
    monkeypatch.setattr(where, attribute, bug)
    if name == "a broken digest that is trusted":
        monkeypatch.setattr(block_manager, "chain_digest", _four_bits)
    assert any(_is_found(seed) for seed in range(200))


def _is_found(seed: int) -> bool:
    try:
        simulate(seed, 100)
    except (AssertionError, IndexError, KeyError, ValueError):
        return True
    return False


def _four_bits(parent: bytes, token_ids: tuple[int, ...]) -> bytes:
    return bytes([(sum(parent) + sum(token_ids) * 7) % 16])


def test_a_digest_of_four_bits_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found by digest is compared: collisions everywhere cost hits, never a wrong key or value."""
    monkeypatch.setattr(block_manager, "chain_digest", _four_bits)
    hits = sum(simulate(seed, 150).counts["prefix hits"] for seed in range(40))
    assert hits > 20


def test_nobody_is_overtaken_for_ever() -> None:
    """A flood of requests for two adapters, two slots, and one request for a third: it runs after a bounded time."""
    world = World(
        num_blocks=60, max_model_len=40, num_slots=2, queue_timeout_seconds=0.0, fault_chance=0.0, max_open=99
    )
    simulation = Simulation(0, world)

    def request(number: int, version: str) -> Request:
        params = SamplingParams(max_tokens=8, seed=0, ignore_eos=True)
        return Request(f"{version}-{number}", (1, 2, 3), params, loras=(LoraRef(version),), arrival_seconds=0.0)

    for number in range(6):
        simulation.submit(request(number, f"v{number % 2}"))
    simulation.step()
    simulation.submit(request(0, "rare"))
    for number in range(6, 400):
        simulation.submit(request(number, f"v{number % 2}"))
        simulation.step()
        if "rare-0" not in simulation.clients:
            break
    # 32 steps of being passed over, then those that run end (8 tokens each), then its own 8 tokens.
    assert simulation.report.num_steps < 70
    simulation.finish()
