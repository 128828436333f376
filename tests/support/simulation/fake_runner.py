"""A model made of arithmetic, which notices when it is shown the wrong keys and values ("KV provenance").

What it writes into a KV slot is a number that stands for everything up to there: the adapters it found in the adapter
slots, the tenant, every token. Each step it reads the whole block table back. So a wrong block, a stale prefix, a
swapped adapter slot or a lost token is a failed assertion at the first step, or another token than the client expects.
Used by the simulator, the engine's tests and, behind the real server, by whoever needs a model without a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from guanaco.server.engine.request import (
    Request,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    TokenLogprob,
)
from guanaco.server.engine.speculation.verify import verified

_MASK = (1 << 61) - 1
_UNWRITTEN = -1


@lru_cache(maxsize=4096)
def namespace_number(salt: str, loras: tuple[tuple[str | None, float], ...]) -> int:
    """A number for what keys and values depend on besides the tokens; the same in every process."""
    number = 0
    for byte in f"{salt}|{loras}".encode():
        number = (number * 1_000_003 + byte + 1) & _MASK
    return number


def next_state(state: int, namespace: int, token_id: int) -> int:
    """The "key and value" of a position, from those of the position before."""
    return (state * 6364136223846793005 + (namespace ^ (token_id * 1442695040888963407)) + 1) & _MASK


def next_token(state: int, seed: int, vocab_size: int) -> int:
    """The "sampled" token after a position."""
    return ((state ^ (seed * 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 >> 29 & _MASK) % vocab_size


def namespace_of_request(request: Request) -> int:
    return namespace_number(request.cache_salt, tuple((lora.version, lora.scale) for lora in request.loras))


def expected_tokens(request: Request, num_tokens: int, vocab_size: int) -> list[int]:
    """The first output tokens of a request, worked out without any engine."""
    namespace, state = namespace_of_request(request), 0
    for token in request.prompt_token_ids:
        state = next_state(state, namespace, token)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(next_token(state, request.params.seed or 0, vocab_size))
        state = next_state(state, namespace, tokens[-1])
    return tokens


class RunnerFault(RuntimeError):
    """What the fake runner raises when it is told to fail."""


@dataclass
class RunnerFaults:
    """How the fake runner fails. Ids are request ids."""

    raising_ids: set[str] = field(default_factory=set)  # a forward pass with one of these raises
    nan_ids: set[str] = field(default_factory=set)  # these rows come out as an error
    num_raising_runs: int = 0  # so many of the next forward passes raise, whoever is in them
    max_tokens: int | None = None  # a larger forward pass raises, as if memory had run out
    bad_versions: set[str] = field(default_factory=set)  # adapters that cannot be loaded
    num_failing_loads: int = 0  # so many of the next adapter loads fail
    broken: bool = False  # nothing works any more


class FakeRunner:
    """Duck-typed `ModelRunner` with a KV cache of numbers. `sees` is told of each write, to check the ledger by it."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, vocab_size: int = 50) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.faults = RunnerFaults()
        self.memory: list[list[int]] = [[_UNWRITTEN] * block_size for _ in range(num_blocks)]
        self.slots: list[str | None] = [None] * num_slots
        self.num_runs = 0
        self.violation: AssertionError | None = None  # the first one: an engine takes it for one request's failure
        self.failed_alone: set[str] = set()  # requests whose own forward pass failed
        self.failed_loads: set[str] = set()  # versions whose load failed
        self._expected: dict[Sequence, list[int]] = {}  # what a sequence must find at each of its positions

    def load_adapter(self, slot: int, version: str) -> None:
        self.slots[slot] = None
        faults = self.faults
        if version in faults.bad_versions or faults.broken or faults.num_failing_loads:
            faults.num_failing_loads = max(0, faults.num_failing_loads - 1)
            self.failed_loads.add(version)
            raise RunnerFault("this adapter load fails")
        self.slots[slot] = version

    def clear_adapter(self, slot: int) -> None:
        self.slots[slot] = None

    def run(self, batch: ScheduledBatch, begin: Callable[[], None]) -> tuple[SampledToken, ...]:
        self.num_runs += 1
        begin()
        try:
            fails = self._fails(batch)
            # A pass that fails may have written its keys and values.
            results = tuple(self._row(item, batch.adapter_slots) for item in batch.sequences)
        except AssertionError as error:
            self.violation = self.violation or error
            raise
        if fails:
            if len(batch.sequences) == 1:
                self.failed_alone.add(batch.sequences[0].sequence.request.request_id)
            raise RunnerFault("this forward pass fails")
        return results

    def _fails(self, batch: ScheduledBatch) -> bool:
        faults = self.faults
        if faults.broken:
            return True
        if faults.num_raising_runs:
            faults.num_raising_runs -= 1
            return True
        if faults.max_tokens is not None and batch.num_tokens > faults.max_tokens:
            return True
        return bool(faults.raising_ids) and any(
            item.sequence.request.request_id in faults.raising_ids for item in batch.sequences
        )

    def probe(self) -> None:
        if self.faults.broken:
            raise RunnerFault("broken")

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept of a finished sequence."""
        self._expected.pop(sequence, None)

    def write_allowed(self, block: int) -> None:
        """Hook: `block` is about to be written."""

    def _row(self, item: ScheduledSequence, adapter_slots: dict[str, int]) -> SampledToken:
        sequence, size, memory = item.sequence, self.block_size, self.memory
        request, table, tokens = sequence.request, sequence.block_table, sequence.token_ids
        namespace = self._namespace(request, adapter_slots)
        start = sequence.num_computed_tokens
        stop = start + item.num_new_tokens
        state = memory[table[(start - 1) // size]][(start - 1) % size] if start else 0
        block = -1
        for position in range(start, stop):
            if table[position // size] != block:
                block = table[position // size]
                self.write_allowed(block)
            state = next_state(state, namespace, tokens[position])
            memory[block][position % size] = state
        self._read_back(sequence, stop)
        drawn = [next_token(state, request.params.seed or 0, self.vocab_size)]
        for position, guess in enumerate(item.draft, start=stop):
            if table[position // size] != block:
                block = table[position // size]
                self.write_allowed(block)
            state = next_state(state, namespace, guess)
            memory[block][position % size] = state
            drawn.append(next_token(state, request.params.seed or 0, self.vocab_size))
        if request.request_id in self.faults.nan_ids:
            return SampledToken(None, error="numerical_error")
        token = (
            verified(item.draft, iter([SampledToken(t) for t in drawn])) if item.needs_sample else SampledToken(None)
        )
        if request.params.prompt_logprobs is None:
            return token
        scored = range(max(start, sequence.num_prompt_logprobs), min(stop, sequence.num_prompt_tokens - 1))
        return replace(token, prompt_logprobs=tuple(TokenLogprob(tokens[i + 1], -1.0, ()) for i in scored))

    def _read_back(self, sequence: Sequence, num_tokens: int) -> None:
        """Everything the sequence attends to must be its own prefix."""
        expected = self._expected.get(sequence)
        if expected is None:
            expected = self._expected[sequence] = []
        if len(expected) < num_tokens:
            namespace, state = namespace_of_request(sequence.request), expected[-1] if expected else 0
            for token in sequence.token_ids[len(expected) : num_tokens]:
                state = next_state(state, namespace, token)
                expected.append(state)
        found: list[int] = []
        for block in sequence.block_table:
            found += self.memory[block]
        assert found[:num_tokens] == expected[:num_tokens], "a sequence attends to keys and values that are not its own"

    def _namespace(self, request: Request, adapter_slots: dict[str, int]) -> int:
        """As the model would: from what really is in the adapter slots."""
        loras = tuple((self.slots[adapter_slots[lora.version]], lora.scale) for lora in request.loras)
        return namespace_number(request.cache_salt, loras)
