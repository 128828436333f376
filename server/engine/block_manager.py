"""The ledger of KV blocks: who holds which, what full blocks hold, and which of the free ones go first.

Integers only: the tensors are `models.kv_cache`'s. A full block is found again by (what it continues, its tokens), an
exact comparison at every link and not a hash, from a root that is the request's tenant salt and its adapters' versions.
Called by the scheduler and its simulator, from one thread.
"""

from collections import OrderedDict
from collections.abc import Iterator

from guanaco.server.engine.request import Request, Sequence

# What a block continues: the number of the content before it, or for a prompt's first block the request's namespace.
Namespace = tuple[str, tuple[tuple[str, float], ...]]
BlockKey = tuple[Namespace | int, tuple[int, ...]]


def namespace_of(request: Request) -> Namespace:
    """Requests share blocks only if this is equal: K and V depend on the adapters' content and scales, and tenants
    must not learn of each other's prompts from a fast answer."""
    return request.cache_salt, tuple((lora.version, lora.scale) for lora in request.loras)


class Faults:
    """Where a simulator may make the ledger misbehave within its rights. The real engine runs on this: no faults."""

    def refuse_allocation(self) -> bool:
        """Act as if no block were free."""
        return False

    def ignore_prefix(self) -> bool:
        """Act as if nothing were cached."""
        return False


class BlockManager:
    """`num_blocks` blocks of `block_size` positions, reference-counted; free ones keep their content until reused."""

    def __init__(self, num_blocks: int, block_size: int, faults: Faults | None = None) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._faults = faults or Faults()
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first to be reused first
        self._cached: dict[BlockKey, int] = {}  # key → the block that holds it
        self._keys: list[BlockKey | None] = [None] * num_blocks  # the reverse
        self._contents = [0] * num_blocks  # the number of a cached block's content, never used twice
        self._next_content = 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    @property
    def usage_ratio(self) -> float:
        return 1.0 - len(self._free) / self.num_blocks

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold its first `num_tokens` positions."""
        return -(-num_tokens // self.block_size) - len(sequence.block_table)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence's tokens begin with. The last token is always left to be computed:
        its logits are what the sequence needs next."""
        if sequence.request.params.prompt_logprobs is not None or self._faults.ignore_prefix():
            return []  # a prompt's log-probabilities need every position computed
        blocks: list[int] = []
        parent: Namespace | int = namespace_of(sequence.request)
        for key_tokens in self._full_blocks(sequence, sequence.num_tokens - 1):
            block = self._cached.get((parent, key_tokens))
            if block is None:
                break
            blocks.append(block)
            parent = self._contents[block]
        return blocks

    def take_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        """Give the blocks of `find_prefix` to a sequence that holds none yet."""
        assert not sequence.block_table
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)
            sequence.block_table.append(block)
            sequence.block_contents.append(self._contents[block])
        sequence.num_computed_tokens = len(blocks) * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let the sequence hold its first `num_tokens` positions; False, and nothing changed, without enough blocks."""
        missing = self.num_missing_blocks(sequence, num_tokens)
        if missing <= 0:
            return True
        if missing > len(self._free) or self._faults.refuse_allocation():
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget_content(block)
            self._references[block] = 1
            sequence.block_table.append(block)
        return True

    def commit(self, sequence: Sequence) -> None:
        """Make the sequence's computed full blocks findable. Of equal blocks the first one stays the cached one."""
        done = len(sequence.block_contents)
        if (done + 1) * self.block_size > sequence.num_computed_tokens:
            return
        parent: Namespace | int = sequence.block_contents[-1] if done else namespace_of(sequence.request)
        for index, tokens in enumerate(self._full_blocks(sequence, sequence.num_computed_tokens, done), done):
            key: BlockKey = (parent, tokens)
            block = self._cached.get(key)
            if block is None:
                block = sequence.block_table[index]
                self._cached[key] = block
                self._keys[block] = key
                self._contents[block] = self._next_content
                self._next_content += 1
            parent = self._contents[block]
            sequence.block_contents.append(parent)

    def free(self, sequence: Sequence) -> None:
        """Take back everything a sequence holds. The end of a prefix is reused before its beginning, and blocks
        without content before all others."""
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was freed twice"
            if self._references[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table = []
        sequence.block_contents = []
        sequence.num_computed_tokens = 0

    def evict_cached(self) -> None:
        """Forget everything that is cached and held by nobody."""
        for block in self._free:
            self._forget_content(block)

    def check(self, sequences: list[Sequence]) -> None:
        """Assert every invariant of the ledger, given all sequences that may hold blocks; for tests."""
        held = [0] * self.num_blocks
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a block is twice in one table"
            assert len(sequence.block_contents) <= len(sequence.block_table)
            for block in sequence.block_table:
                held[block] += 1
        assert held == self._references, "reference counts differ from what is held"
        assert set(self._free) == {block for block, count in enumerate(held) if count == 0}, "the free list is wrong"
        assert all(self._keys[block] == key for key, block in self._cached.items()), "cache and reverse map disagree"
        assert sum(key is not None for key in self._keys) == len(self._cached)

    def _full_blocks(self, sequence: Sequence, num_tokens: int, first: int = 0) -> Iterator[tuple[int, ...]]:
        """The tokens of each full block from block `first` on, within the first `num_tokens`."""
        size = self.block_size
        for start in range(first * size, num_tokens - size + 1, size):
            yield tuple(sequence.token_ids[start : start + size])

    def _forget_content(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._cached[key]
            self._keys[block] = None
