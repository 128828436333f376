"""The ledger of KV blocks: which sequences hold which block, what full blocks hold, which free block is reused first.

Integers only: the tensors are in `models.architectures.kv_cache`. A full block is found again by a digest of the
request's namespace (tenant salt, adapters' versions and scales) and of all tokens up to the block's end. The contents
are also compared, so that not even a broken digest could serve one request's keys and values to another. Called by the
scheduler and its simulator, from one thread.
"""

import hashlib
import struct
from collections import OrderedDict

from guanaco.server.engine.request import BlockContent, Request, Sequence


def root_content(request: Request) -> BlockContent:
    """The parent of a prompt's first block: no tokens, only the request's namespace.

    Requests share blocks only if their roots are equal: K and V depend on the adapters' content and scales, and a
    tenant must not learn from a fast answer that another tenant has sent the same prompt.
    """
    loras = tuple((lora.version, lora.scale) for lora in request.loras)
    salt = request.cache_salt.encode(errors="surrogatepass")
    parts = [struct.pack("<Q", len(salt)), salt]  # lengths first: no two namespaces have the same bytes
    for version, scale in loras:
        name = version.encode(errors="surrogatepass")
        parts += [struct.pack("<Q", len(name)), name, struct.pack("<d", scale)]
    return BlockContent(None, (), (request.cache_salt, loras), hashlib.sha256(b"".join(parts)).digest())


def next_content(parent: BlockContent, token_ids: tuple[int, ...]) -> BlockContent:
    """The content of the block after `parent`."""
    return BlockContent(parent, token_ids, parent.namespace, chain_digest(parent.digest, token_ids))


def chain_digest(parent: bytes, token_ids: tuple[int, ...]) -> bytes:
    """A block's digest: SHA-256 of its parent's digest, followed by its token ids in eight bytes each."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}q", *token_ids)).digest()


def is_same_content(one: BlockContent, other: BlockContent) -> bool:
    """Whether two blocks hold the same tokens after the same parents, whatever their digests say.

    Walks both chains back, and stops where they are the same object.
    """
    while one is not other:
        if one.token_ids != other.token_ids or one.namespace != other.namespace:
            return False
        if one.parent is None or other.parent is None:
            return one.parent is other.parent
        one, other = one.parent, other.parent
    return True


class BlockManager:
    """`num_blocks` blocks of `block_size` positions, reference-counted; free ones keep their content until reused."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first to be reused first
        self._cached: dict[bytes, int] = {}  # digest → the block that can be found by it
        self._contents: list[BlockContent | None] = [None] * num_blocks  # the reverse: what a findable block holds

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached ones included."""
        return len(self._free)

    @property
    def usage_ratio(self) -> float:
        return 1.0 - len(self._free) / self.num_blocks

    def num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more blocks the sequence needs to hold its first `num_tokens` positions."""
        return -(-num_tokens // self.block_size) - len(sequence.block_table)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the beginning of the sequence's tokens. They never cover its last token, which
        must be computed: the sequence needs its logits next."""
        if sequence.request.params.prompt_logprobs is not None:
            return []  # a prompt's log-probabilities need every position computed
        blocks: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._find(sequence, index)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take_prefix(self, sequence: Sequence, blocks: list[int]) -> None:
        """Give the blocks of `find_prefix` to a sequence that holds none yet."""
        assert not sequence.block_table
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)
        sequence.block_table += blocks
        sequence.num_findable_blocks = len(blocks)
        sequence.num_computed_tokens = len(blocks) * self.block_size

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence the blocks for its first `num_tokens` positions. Returns False, and changes nothing, if too
        few are free."""
        missing = self.num_missing_blocks(sequence, num_tokens)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget_content(block)
            self._references[block] = 1
            sequence.block_table.append(block)
        return True

    def trim(self, sequence: Sequence, num_tokens: int) -> None:
        """Take back the blocks beyond the sequence's first `num_tokens` positions: those of a rejected draft.

        They hold no full block of its tokens, so none is findable and no other sequence holds one."""
        while self.num_missing_blocks(sequence, num_tokens) < 0:
            block = sequence.block_table.pop()
            assert self._references[block] == 1, "a block of a draft is shared"
            self._references[block] = 0
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def commit(self, sequence: Sequence) -> None:
        """Make the sequence's computed full blocks findable. If an equal block is findable already, that one stays."""
        num_full = sequence.num_computed_tokens // self.block_size
        for index in range(sequence.num_findable_blocks, num_full):
            self._find(sequence, index)
            content, block = self._content(sequence, index), sequence.block_table[index]
            if content.digest not in self._cached:
                self._cached[content.digest] = block
                self._contents[block] = content
        sequence.num_findable_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Take back everything a sequence holds. A prefix's last blocks are reused before its first ones, and blocks
        without content before all others."""
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was freed twice"
            if self._references[block] == 0:
                self._free[block] = None
                if self._contents[block] is None:
                    self._free.move_to_end(block, last=False)
        sequence.block_table = []
        sequence.num_findable_blocks = 0
        sequence.num_computed_tokens = 0

    def evict_cached(self) -> None:
        """Forget the content of every free block."""
        for block in self._free:
            self._forget_content(block)

    def num_holders(self, block: int) -> int:
        """How many sequences hold this block."""
        return self._references[block]

    def content_of(self, block: int) -> BlockContent | None:
        """The content by which a block can be found; None if it cannot be found."""
        return self._contents[block]

    def check(self, sequences: list[Sequence]) -> None:
        """Assert every invariant of the ledger, given all sequences that may hold blocks; for tests."""
        held = [0] * self.num_blocks
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a block is twice in one table"
            assert sequence.num_findable_blocks <= len(sequence.block_table)
            for block in sequence.block_table:
                held[block] += 1
        assert held == self._references, "reference counts differ from what is held"
        assert set(self._free) == {block for block, count in enumerate(held) if count == 0}, "the free list is wrong"
        findable = {content.digest: block for block, content in enumerate(self._contents) if content is not None}
        assert findable == self._cached, "the prefix cache and its reverse disagree"

    def _content(self, sequence: Sequence, index: int) -> BlockContent:
        """The content of the sequence's block `index` when it is full. Computed once: tokens are only ever appended."""
        contents, size = sequence.block_contents, self.block_size
        if not contents:
            contents.append(root_content(sequence.request))
        for i in range(len(contents) - 1, index + 1):
            contents.append(next_content(contents[-1], tuple(sequence.token_ids[i * size : (i + 1) * size])))
        return contents[index + 1]

    def _find(self, sequence: Sequence, index: int) -> int | None:
        """A cached block with the content that the sequence's block `index` will have; None if there is none."""
        content = self._content(sequence, index)
        block = self._cached.get(content.digest)
        if block is None:
            return None
        found = self._contents[block]
        assert found is not None
        if not is_same_content(found, content):
            return None
        if found is not content:  # one record for equal content: the next comparison ends at this block
            sequence.block_contents[index + 1 :] = [found]
        return block

    def _forget_content(self, block: int) -> None:
        content = self._contents[block]
        if content is not None:
            del self._cached[content.digest]
            self._contents[block] = None
