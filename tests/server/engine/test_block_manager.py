"""The ledger of blocks: what is shared, what is found again, what is reused first. The simulator proves the rest."""

import pytest

from guanaco.server.engine.block_manager import BlockManager, root_content
from guanaco.server.engine.request import LoraRef, Request, SamplingParams, Sequence

PARAMS = SamplingParams(max_tokens=8)


def _sequence(tokens: list[int], *, salt: str = "", loras: tuple[LoraRef, ...] = (), **params: object) -> Sequence:
    request = Request("r", tuple(tokens), SamplingParams(max_tokens=8, **params), loras, cache_salt=salt)  # type: ignore[arg-type]
    return Sequence(request, list(tokens))


def _compute(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """Find, allocate, compute and commit everything of a sequence."""
    blocks.take_prefix(sequence, blocks.find_prefix(sequence))
    assert blocks.allocate(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)
    return sequence


@pytest.mark.parametrize("length", range(1, 14))
def test_a_sequence_holds_as_many_blocks_as_it_needs(length: int) -> None:
    blocks = BlockManager(4, 4)
    sequence = _sequence(list(range(length)))
    assert blocks.allocate(sequence, length)
    assert len(sequence.block_table) == -(-length // 4)
    assert blocks.num_free_blocks == 4 - len(sequence.block_table)
    blocks.check([sequence])


def test_without_enough_blocks_nothing_changes() -> None:
    blocks = BlockManager(3, 4)
    first, second = _sequence([1] * 8), _sequence([2] * 8)
    assert blocks.allocate(first, 8)
    assert not blocks.allocate(second, 8)
    assert (second.block_table, blocks.num_free_blocks) == ([], 1)
    blocks.check([first, second])


def test_equal_beginnings_share_blocks_and_the_last_token_is_computed() -> None:
    blocks = BlockManager(16, 4)
    first = _compute(blocks, _sequence(list(range(12))))
    for tokens, shared in ((list(range(12)), 2), (list(range(13)), 3), ([*range(8), 99, 98], 2), ([7, *range(11)], 0)):
        other = _sequence(tokens)
        assert blocks.find_prefix(other) == first.block_table[:shared]


def test_what_separates_namespaces() -> None:
    """Tenant, adapters' versions, their scales and their order: each makes another key, and equal ones the same."""
    tokens = list(range(9))
    kinds = [
        {},
        {"salt": "t"},
        {"salt": "u"},
        {"loras": (LoraRef("x"),)},
        {"loras": (LoraRef("x", 0.5),)},
        {"loras": (LoraRef("x"), LoraRef("y"))},
        {"loras": (LoraRef("y"), LoraRef("x"))},
        {"salt": "x"},
    ]
    blocks = BlockManager(64, 4)
    held = [_compute(blocks, _sequence(tokens, **kind)) for kind in kinds]  # type: ignore[arg-type]
    assert len({block for sequence in held for block in sequence.block_table}) == 3 * len(kinds)
    for kind, sequence in zip(kinds, held, strict=True):
        assert blocks.find_prefix(_sequence(tokens, **kind)) == sequence.block_table[:2]  # type: ignore[arg-type]
    assert len({root_content(_sequence(tokens, **kind).request).digest for kind in kinds}) == len(kinds)  # type: ignore[arg-type]


def test_freed_blocks_are_found_until_they_are_needed_and_a_prefixs_end_goes_first() -> None:
    blocks = BlockManager(6, 2)
    first = _compute(blocks, _sequence([1, 2, 3, 4, 5, 6]))
    table = list(first.block_table)
    blocks.free(first)
    assert blocks.num_free_blocks == 6
    assert blocks.find_prefix(_sequence([1, 2, 3, 4, 5, 6, 7])) == table
    other = _sequence([9] * 8)
    assert blocks.allocate(other, 8)  # three were never used: of the cached ones only the last must go
    assert blocks.find_prefix(_sequence([1, 2, 3, 4, 5, 6, 7])) == table[:2]
    blocks.check([other])


def test_a_shared_block_outlives_its_first_holder() -> None:
    blocks = BlockManager(8, 2)
    first = _compute(blocks, _sequence([1, 2, 3, 4, 5]))
    second = _compute(blocks, _sequence([1, 2, 3, 4, 6]))
    assert second.block_table[:2] == first.block_table[:2]
    blocks.free(first)
    blocks.check([second])
    assert blocks.num_holders(second.block_table[0]) == 1


def test_prompt_logprobs_need_every_position_computed() -> None:
    blocks = BlockManager(8, 2)
    _compute(blocks, _sequence([1, 2, 3, 4, 5]))
    assert blocks.find_prefix(_sequence([1, 2, 3, 4, 5], prompt_logprobs=0)) == []


def test_eviction_forgets_what_nobody_holds() -> None:
    blocks = BlockManager(8, 2)
    held = _compute(blocks, _sequence([1, 2, 3, 4, 5]))
    freed = _compute(blocks, _sequence([6, 7, 8, 9]))
    blocks.free(freed)
    blocks.evict_cached()
    assert blocks.find_prefix(_sequence([6, 7, 8, 9, 1])) == []
    assert blocks.find_prefix(_sequence([1, 2, 3, 4, 5])) == held.block_table[:2]
    blocks.check([held])
