"""What only the reference provider's attention has: bounds on its memory, and the groups that it decodes together."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from guanaco.kernels import load_ops, reference
from support.kernels.attention_cases import check, make_case
from support.kernels.tolerances import assert_close, relative_l2

CPU = torch.device("cpu")


def make_ops(dtype: torch.dtype = torch.float32) -> Any:
    return load_ops("reference", device=CPU, dtype=dtype)


def test_queries_are_cut_to_save_memory(monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    case, ops = make_case([(400, 350), (90, 90)]), make_ops()
    whole = case.run(ops)
    monkeypatch.setattr(reference, "ATTENTION_SCORES", 4 * 400 * 10)
    assert_close(case.run(ops)[0], whole[0], torch.float32)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of the inner function sees more scores or keys than the limits, unless one query or sequence needs it."""
    monkeypatch.setattr(reference, "ATTENTION_SCORES", 4 * 256 * 10)
    monkeypatch.setattr(reference, "GATHERED_KEYS", 2 * 16 * 1000)
    prompt, decode = [], []
    attend = reference._attend

    def spy(q: Tensor, keys: Tensor, values: Tensor, limits: Tensor, scale: float) -> Tensor:
        if q.shape[1] > 1:
            prompt.append(q.shape[1] * q.shape[2] * keys.shape[2])
        else:
            decode.append(keys.numel())
        return attend(q, keys, values, limits, scale)

    monkeypatch.setattr(reference, "_attend", spy)
    check(make_case([(256, 250), (1200, 1), *((200 + i, 1) for i in range(30))]), make_ops(), torch.float32)
    assert max(prompt) <= 4 * 256 * 10
    assert len(prompt) == 25
    *batches, alone = sorted(decode)
    assert alone == 1200 * 2 * 16
    assert 2 * 16 * 900 < max(batches) <= 2 * 16 * 1000
    assert len(decode) <= 10


def test_padding_of_decode_groups_is_bounded() -> None:
    generator = random.Random(0)
    for _ in range(50):
        contexts = [(generator.choice([1, 7, 40, 41, 300, 2000]) + generator.randrange(9), i) for i in range(40)]
        groups = reference._decode_groups(contexts, max_positions=1000)
        assert sorted(i for group in groups for i in group) == list(range(40))
        length = {i: n for n, i in contexts}
        for group in groups:
            longest = max(length[i] for i in group)
            assert length[group[-1]] == longest
            assert min(length[i] for i in group) >= longest * 0.75
            assert len(group) == 1 or len(group) * longest <= 1000


@pytest.mark.parametrize("bug", ["causal", "head"])
def test_planted_bugs_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must fail for a mask off by one and heads that share wrongly."""
    case = make_case([(40, 10), (30, 1)], heads=6, kv_heads=3)
    ops = make_ops()
    expected = [case.exact(i) for i in range(2)]
    attend = reference._attend
    if bug == "causal":
        monkeypatch.setattr(reference, "_attend", lambda q, k, v, limits, s: attend(q, k, v, limits - 1, s))
    else:
        monkeypatch.setattr(reference, "_attend", lambda q, k, v, limits, s: attend(q.roll(1, 2), k, v, limits, s))
    for i, out in enumerate(case.run(ops)):
        assert not relative_l2(out, expected[i]) <= 1e-2
