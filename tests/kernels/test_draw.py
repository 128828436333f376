"""Picking tokens by the kernels of the providers that do: held to the sampler's own numpy code, the specification."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.kernels import Draw
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample
from support.kernels.providers import INTERPRETED, PROVIDERS, provider_ops

DRAWING = tuple(name for name in PROVIDERS if name != "reference")
NATIVE = tuple(name for name in DRAWING if name not in INTERPRETED)
VOCAB = 3001  # more than the candidates that the specification looks at first, and odd


def rows(fields: list[dict[str, Any]]) -> list[SamplingRow]:
    return [SamplingRow(SamplingParams(max_tokens=1, **f), (1,), []) for f in fields]


class Counted:
    """Ops of which it is known whether they were asked."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.num_draws = ops, 0

    def draw(self, logits: torch.Tensor, draws: Any) -> Any:
        self.num_draws += 1
        found = self.ops.draw(logits, draws)
        assert found is not None
        return found


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


cases = {
    "fields": st.lists(parameters, min_size=1, max_size=5),
    "spread": st.sampled_from([0.0, 0.5, 3.0, 30.0, 1e4]),
    "seed": st.integers(0, 2**31 - 1),
}


def check_against_the_specification(name: str, fields: list[dict[str, Any]], spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(fields), VOCAB, generator=generator) * spread
    logits[:, ::7] = logits[:, :1]  # equal ones, which go by id
    # Two are forbidden, so that no share of equal tokens falls on a top_p to the last bit.
    fields = [{**one, "min_tokens": 1, "stop_token_ids": frozenset({5, 6})} for one in fields]
    ops = Counted(provider_ops(name))
    found = ids(logits, fields, ops)
    assert ops.num_draws == 1, "the provider drew them"
    for row, token, expected in zip(logits, found, ids(logits, fields, None), strict=True):
        # Logits that e^x in float32 cannot tell apart come in the order of its rounding; equal ones always by id.
        apart = (row[token] - row[expected]).abs() / row[expected].abs().clamp(min=1.0)
        assert token == expected or 0 < apart <= 1e-6, (token, expected)


test_the_same_tokens_as_the_specification = pytest.mark.parametrize("name", NATIVE)(
    settings(max_examples=60, deadline=None)(given(**cases)(check_against_the_specification))
)
test_the_same_tokens_as_the_specification_interpreted = pytest.mark.parametrize("name", INTERPRETED)(
    settings(max_examples=8, deadline=None)(given(**cases)(check_against_the_specification))
)


@pytest.mark.parametrize("name", DRAWING)
def test_greedy_takes_the_first_of_the_largest(name: str) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [70, 2999]] = 4.0
    logits[2] = -math.inf
    logits[2, 2999] = -1e30
    greedy, ops = Draw(0.0, 0, 1.0, 0.0, 0.0), provider_ops(name)
    assert ops.draw(logits, [greedy] * 3) == [0, 70, 2999]
    assert ops.draw(logits[1:], [greedy, Draw(1.0, 0, 1.0, 0.0, 0.5)]) == [70, 2999], "beside a row that is drawn"
    assert ops.draw(logits[:0], []) == []


@pytest.mark.parametrize("name", DRAWING)
def test_the_ends_of_the_noise_stay_inside(name: str) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -200.0, 0.0, -math.inf]])
    for uniform, token in ((0.0, 1), (0.49999, 1), (0.5, 3), (1 - 2**-53, 3)):
        for top_p, min_p in ((1.0, 0.0), (0.9999, 0.0), (1.0, 0.1)):
            assert provider_ops(name).draw(logits, [Draw(1.0, 0, top_p, min_p, uniform)]) == [token]


@pytest.mark.parametrize("name", DRAWING)
def test_frequencies(name: str) -> None:
    """At evenly spaced noise every token comes up as often as it is likely; with top_k among those that are left."""
    logits, count = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 50 if name in INTERPRETED else 2000
    for temperature, top_k in ((0.5, 0), (1.0, 2)):
        draws = [Draw(temperature, top_k, 1.0, 0.0, (i + 0.5) / count) for i in range(count)]
        shares = torch.tensor(provider_ops(name).draw(logits.expand(count, -1), draws)).bincount(minlength=4) / count
        left = logits[0].masked_fill(torch.arange(4) < 4 - (top_k or 4), -math.inf)
        assert (shares - (left / temperature).softmax(0)).abs().max() <= 1 / count + 1e-6


@pytest.mark.parametrize("name", DRAWING)
def test_a_tiny_temperature_is_argmax(name: str) -> None:
    """Also one whose reciprocal float32 does not hold."""
    logits = torch.tensor([[1.0, 3.0, 3.0 - 1e-6, -2.0]])
    for temperature in (1e-6, 1e-30, 1e-39, 1e-44):
        for top_p in (1.0, 0.5):
            assert provider_ops(name).draw(logits, [Draw(temperature, 0, top_p, 0.0, 0.4)])[0] in (1, 2)
            assert provider_ops(name).draw(logits[:, [0, 1, 3]], [Draw(temperature, 0, top_p, 0.0, 0.9)]) == [1]


@pytest.mark.parametrize("name", DRAWING)
def test_a_row_that_is_not_finite_ends_alone(name: str) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 9] = math.nan
    found = ids(logits, [{"temperature": 1.0, "seed": 1}] * 3, provider_ops(name))
    assert [token is None for token in found] == [False, True, False]
