"""Drawing tokens by the Triton kernel, in Triton's interpreter: held to the sampler's numpy code."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from guanaco.kernels import Draw
from guanaco.kernels.sampling_triton import draw
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample

VOCAB = 3001  # more than a block, and odd


class Counted:
    """`Ops.draw` by the kernel; how often it was asked."""

    def __init__(self) -> None:
        self.num_draws = 0

    def draw(self, logits: torch.Tensor, draws: Any) -> list[int]:
        self.num_draws += 1
        found: list[int] = draw(logits.contiguous(), draws).tolist()
        return found


def ids(logits: torch.Tensor, fields: list[dict[str, Any]], ops: Counted | None) -> list[Any]:
    rows = [SamplingRow(SamplingParams(max_tokens=1, **f), (1,), []) for f in fields]
    return [token.token_id for token in sample(logits, rows, frozenset(), ops)]


parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "seed": st.integers(0, 2**40),
    }
)


@settings(max_examples=8, deadline=None)
@given(
    fields=st.lists(parameters, min_size=1, max_size=4),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0, 1e4]),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_same_tokens_as_the_specification(fields: list[dict[str, Any]], spread: float, seed: int) -> None:
    logits = torch.randn(len(fields), VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    logits[:, ::7] = logits[:, :1]  # equal ones, which go by id
    # Two are forbidden, so that no share of equal tokens falls on a top_p to the last bit.
    fields = [{**one, "min_tokens": 1, "stop_token_ids": frozenset({5, 6})} for one in fields]
    ops = Counted()
    found = ids(logits, fields, ops)
    assert ops.num_draws == 1, "the kernel drew them"
    for row, token, expected in zip(logits, found, ids(logits, fields, None), strict=True):
        # Logits that e^x in float32 cannot tell apart come in the order of its rounding; equal ones always by id.
        apart = (row[token] - row[expected]).abs() / row[expected].abs().clamp(min=1.0)
        assert token == expected or 0 < apart <= 1e-6, (token, expected)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [70, 2999]] = 4.0
    logits[2] = -math.inf
    logits[2, 2999] = -1e30
    assert draw(logits, [Draw(0.0, 0, 1.0, 0.0, 0.0)] * 3).tolist() == [0, 70, 2999]
    assert draw(logits[:0], []).shape == (0,)


def test_the_ends_of_the_noise_stay_inside() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -200.0, 0.0, -math.inf]])
    for uniform, token in ((0.0, 1), (0.49999, 1), (0.5, 3), (1 - 2**-53, 3)):
        for top_p, min_p in ((1.0, 0.0), (0.9999, 0.0), (1.0, 0.1)):
            assert draw(logits, [Draw(1.0, 0, top_p, min_p, uniform)]).tolist() == [token]


def test_frequencies() -> None:
    """At evenly spaced noise every token comes up as often as it is likely; with top_k among those that are left."""
    logits, count = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 60
    for temperature, top_k in ((0.5, 0), (1.0, 2)):
        draws = [Draw(temperature, top_k, 1.0, 0.0, (i + 0.5) / count) for i in range(count)]
        shares = draw(logits.expand(count, -1).contiguous(), draws).bincount(minlength=4) / count
        left = logits[0].masked_fill(torch.arange(4) < 4 - (top_k or 4), -math.inf)
        assert (shares - (left / temperature).softmax(0)).abs().max() <= 1 / count + 1e-6
