"""Picking tokens natively: held to the sampler's own numpy code, which is the specification."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from providers import PROVIDERS, provider_ops

from guanaco.kernels import Draw
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample

NATIVE = tuple(name for name in PROVIDERS if name.startswith("cpu"))
VOCAB = 3001  # more than the candidates that the specification looks at first, and odd


def rows(fields: list[dict[str, Any]]) -> list[SamplingRow]:
    return [SamplingRow(SamplingParams(max_tokens=1, **f), (1,), []) for f in fields]


class Counted:
    """Ops of which it is known whether they were asked."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.num_draws = ops, 0

    def draw(self, logits: torch.Tensor, draws: Any) -> Any:
        self.num_draws += 1
        return self.ops.draw(logits, draws)


def ids(logits: torch.Tensor, fields: list[dict[str, Any]], ops: Any) -> list[int | None]:
    return [token.token_id for token in sample(logits, rows(fields), frozenset(), ops)]


parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 40, 1000]),
        "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "seed": st.integers(0, 2**40),
    }
)


@pytest.mark.parametrize("name", NATIVE)
@settings(max_examples=60, deadline=None)
@given(
    fields=st.lists(parameters, min_size=1, max_size=5),
    spread=st.sampled_from([0.0, 0.5, 3.0, 30.0, 1e4]),
    seed=...,
)
def test_the_same_tokens_as_the_specification(
    name: str, fields: list[dict[str, Any]], spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(abs(seed) % 2**31)
    logits = torch.randn(len(fields), VOCAB, generator=generator) * spread
    logits[:, ::7] = logits[:, :1]  # equal ones, which go by id
    # Two are forbidden, so that no share of equal tokens falls on a top_p to the last bit.
    fields = [{**one, "min_tokens": 1, "stop_token_ids": frozenset({5, 6})} for one in fields]
    ops = Counted(provider_ops(name))
    found = ids(logits, fields, ops)
    assert ops.num_draws == 1, "the native code drew them"
    for row, token, expected in zip(logits, found, ids(logits, fields, None), strict=True):
        # Logits that e^x in float32 cannot tell apart come in the order of its rounding; equal ones always by id.
        apart = (row[token] - row[expected]).abs() / row[expected].abs().clamp(min=1.0)
        assert token == expected or 0 < apart <= 1e-6, (token, expected)


@pytest.mark.parametrize("name", NATIVE)
def test_greedy_takes_the_first_of_the_largest(name: str) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [70, 2000]] = 4.0
    logits[2] = -math.inf
    logits[2, 17] = -1e30
    assert provider_ops(name).draw(logits, [Draw(0.0, 0, 1.0, 0.0, 0.0)] * 3) == [0, 70, 17]


@pytest.mark.parametrize("name", NATIVE)
def test_the_ends_of_the_noise_stay_inside(name: str) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -200.0, 0.0, -math.inf]])
    for uniform, token in ((0.0, 1), (0.49999, 1), (0.5, 3), (1 - 2**-53, 3)):
        for top_p in (1.0, 0.9999):
            assert provider_ops(name).draw(logits, [Draw(1.0, 0, top_p, 0.0, uniform)]) == [token]


@pytest.mark.parametrize("name", NATIVE)
def test_frequencies(name: str) -> None:
    """Drawn at evenly spaced noise, every token comes up as often as it is likely."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    count = 2000
    for temperature in (0.5, 1.0):
        draws = [Draw(temperature, 0, 1.0, 0.0, (i + 0.5) / count) for i in range(count)]
        tokens = torch.tensor(provider_ops(name).draw(logits.expand(count, -1), draws))
        shares = tokens.bincount(minlength=4) / count
        assert (shares - (logits[0] / temperature).softmax(0)).abs().max() <= 1 / count + 1e-6


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_that_is_not_finite_ends_alone(name: str) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 9] = math.nan
    found = ids(logits, [{"temperature": 1.0, "seed": 1}] * 3, provider_ops(name))
    assert [token is None for token in found] == [False, True, False]
