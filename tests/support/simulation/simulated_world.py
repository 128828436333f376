"""How large one simulated world is, what goes wrong in it, and the runner that sees whose memory it reads and writes.

Parts of `simulator`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.server.engine.block_manager import BlockManager
from guanaco.server.engine.request import Request, SampledToken, ScheduledBatch, Sequence
from support.simulation.fake_runner import FakeRunner
from support.simulation.simulated_adapters import SimulatedAdapters


@dataclass(frozen=True)
class World:
    """The size of everything in one simulation."""

    block_size: int = 4
    num_blocks: int = 12
    max_model_len: int = 40
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    num_slots: int = 2
    num_adapters: int = 4
    host_room: int = 99  # adapters take 1 to 4
    arena_bytes: int = 0  # of the device, where adapters take three times as much; 0: none, as on a CPU
    flood_num_seqs: int = 8
    flood_step_tokens: int = 0
    queue_timeout_seconds: float = 40.0
    adapter_timeout_seconds: float = 0.0
    vocab_size: int = 24
    submit_chance: float = 0.15
    abort_chance: float = 0.03
    fault_chance: float = 0.03
    max_open: int = 12
    draft_chance: float = 0.0  # that a decoding sequence gets a draft

    @staticmethod
    def of_seed(seed: int) -> "World":
        random = Random(f"world {seed}")
        block_size = random.choice((1, 2, 3, 4, 4, 8))
        max_model_len = random.randint(6, 48)
        least = -(-max_model_len // block_size)  # one sequence must fit, and hardly more does
        max_num_seqs = random.choice((1, 2, 3, 4, 4, 6, 8))
        return World(
            block_size=block_size,
            num_blocks=least + random.randint(0, least),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + random.randint(0, 24),
            num_slots=random.choice((0, 1, 2, 2, 3)),
            num_adapters=random.choice((1, 2, 4, 6)),
            host_room=random.choice((4, 6, 8, 99)),
            arena_bytes=random.choice((0, 12, 16, 24)),
            flood_num_seqs=random.choice((2, 3, 8)),
            flood_step_tokens=random.choice((0, 1, 2, 5)),
            queue_timeout_seconds=random.choice((0.0, 30.0, 200.0)),
            adapter_timeout_seconds=random.choice((0.0, 8.0, 100.0)),
            vocab_size=random.choice((8, 24, 50)),
            submit_chance=random.choice((0.1, 0.3, 0.6)),
            abort_chance=random.choice((0.0, 0.02, 0.08)),
            fault_chance=random.choice((0.0, 0.01, 0.05)),
            max_open=random.choice((4, 8, 12)),
            draft_chance=random.choice((0.0, 0.3, 0.9)),
        )


class SeededFaults:
    """Faults of ledger and scheduler, as often as `chance` says. `num_fired` counts those of this step."""

    def __init__(self, random: Random, chance: float) -> None:
        self._random = random
        self.chance = chance
        self.num_fired = 0

    def _fires(self) -> bool:
        if self.chance and self._random.random() < self.chance:
            self.num_fired += 1
            return True
        return False

    refuse_allocation = _fires
    ignore_prefix = _fires
    preempt_now = _fires


class FaultyBlocks(BlockManager):
    """The ledger of blocks, which at times acts as if nothing were free or cached: it may, and others must cope."""

    def __init__(self, num_blocks: int, block_size: int, faults: SeededFaults) -> None:
        super().__init__(num_blocks, block_size)
        self._faults = faults

    def find_prefix(self, sequence: Sequence) -> list[int]:
        if sequence.request.params.prompt_logprobs is None and self._faults.ignore_prefix():
            return []
        return super().find_prefix(sequence)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self.num_missing_blocks(sequence, num_tokens)
        if 0 < missing <= self.num_free_blocks and self._faults.refuse_allocation():
            return False
        return super().allocate(sequence, num_tokens)


class LedgerRunner(FakeRunner):
    """The fake runner, which also checks that only a block of one holder, and not a findable one, is written."""

    blocks: BlockManager
    adapters: SimulatedAdapters

    table: SlotTable
    arena: list[str | None]  # whose matrices each byte of the device's arena holds

    def load_adapter(self, slot: int, version: str) -> None:
        try:
            self.adapters.check_loaded(version)
        except AssertionError as error:
            self.violation = self.violation or error
        super().load_adapter(slot, version)
        self.arena[self._piece(version)] = [version] * self.table._sizes.get(version, 0)

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        for version in {version for item in batch.sequences for version in item.sequence.versions}:
            if set(self.arena[self._piece(version)]) - {version}:
                self.violation = self.violation or AssertionError("an adapter's matrices are another one's")
        return super().run(batch, begin)

    def _piece(self, version: str) -> slice:
        offset = self.table.offset_of(version)
        return slice(offset, offset + self.table._sizes.get(version, 0))

    def write_allowed(self, block: int) -> None:
        assert self.blocks.num_holders(block) == 1, "a shared block is written"
        assert self.blocks.content_of(block) is None, "a block in the prefix cache is written"


@dataclass
class Client:
    """One request as its client sees it: knows what it must get, token by token."""

    request: Request
    namespace: int
    state: int  # the arithmetic model's, after all tokens so far
    num_tokens: int = 0
    num_prompt_logprobs: int = 0
    aborted: bool = False


@dataclass
class Report:
    """What happened in a simulation; for tests that want to know that it did."""

    num_steps: int = 0
    num_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
