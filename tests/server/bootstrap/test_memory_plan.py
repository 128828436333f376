"""The KV cache fits what there is, or the start is refused with the flags that would help."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guanaco.server.bootstrap.memory_plan import AUTO_KV_SHARE, KvRequest, human_bytes, plan_memory
from guanaco.server.errors import CommandError

ASK = KvRequest(block_bytes=1000, block_size=16, kv_bytes=None, max_model_len=None, model_positions=160, max_num_seqs=4)


def _plan(request: KvRequest, free_bytes: int = 10**9):
    return plan_memory(request, weights_bytes=7, adapters_bytes=3, free_bytes=free_bytes)


def test_plenty_of_memory_gives_what_can_be_used_and_no_more() -> None:
    plan = _plan(ASK)
    assert (plan.num_blocks, plan.max_model_len, plan.kv_bytes) == (4 * 10, 160, 40_000)
    assert (plan.total_bytes, plan.notes) == (40_010, ())


def test_a_small_machine_lowers_the_context_and_says_so() -> None:
    plan = _plan(ASK, free_bytes=int(5000 / AUTO_KV_SHARE))
    assert (plan.num_blocks, plan.max_model_len) == (5, 80)
    assert "--kv-cache-memory" in plan.notes[0]


def test_what_adapters_may_come_to_take_is_left_to_them() -> None:
    """The cache takes its share of the rest, but never of less than a half; then the operator is told."""
    free = 1_000_000
    plans = [plan_memory(ASK, weights_bytes=7, adapters_bytes=5, free_bytes=free, coming_bytes=c) for c in (0, 900_000)]
    assert [plan.kv_bytes for plan in plans] == [40_000, 40_000], "what can be used, and no more"
    short = 120_000
    kept = [plan_memory(ASK, weights_bytes=7, adapters_bytes=5, free_bytes=short, coming_bytes=c) for c in (0, 40_000)]
    assert [plan.kv_bytes for plan in kept] == [30_000, 20_000]
    assert not any("--adapter-host-memory" in note for plan in (*plans, *kept) for note in plan.notes)
    full = plan_memory(ASK, weights_bytes=7, adapters_bytes=5, free_bytes=short, coming_bytes=500_000)
    assert full.kv_bytes == int(short / 2 * AUTO_KV_SHARE)
    assert "--adapter-host-memory" in " ".join(full.notes)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"max_model_len": 161}, "--max-model-len 161"),
        ({"kv_bytes": 1999}, "--kv-cache-memory"),
        ({"max_model_len": 160, "kv_bytes": 9999}, "--max-model-len"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, int], flag: str) -> None:
    with pytest.raises(CommandError, match=flag):
        _plan(replace(ASK, **change))


@given(
    block_bytes=st.integers(1, 10**6), block_size=st.integers(1, 256), free=st.integers(0, 10**10),
    kv=st.none() | st.integers(0, 10**10), length=st.none() | st.integers(1, 10**5),
    positions=st.integers(1, 10**5), seqs=st.integers(1, 300),
)  # fmt: skip
def test_a_plan_keeps_its_promises(
    block_bytes: int, block_size: int, free: int, kv: int | None, length: int | None, positions: int, seqs: int
) -> None:
    request = KvRequest(block_bytes, block_size, kv, length, positions, seqs)
    try:
        plan = _plan(request, free)
    except CommandError:
        return
    assert plan.kv_bytes == plan.num_blocks * block_bytes <= (kv if kv is not None else free * AUTO_KV_SHARE)
    assert plan.max_model_len <= min(plan.kv_tokens, positions)
    assert length is None or plan.max_model_len == length
    assert plan.max_model_len == positions or plan.notes or length is not None


def test_sizes_read_well() -> None:
    assert [human_bytes(n) for n in (7, 2048, 3 << 19, 5 << 30)] == ["7 B", "2.0 KiB", "1.5 MiB", "5.0 GiB"]
