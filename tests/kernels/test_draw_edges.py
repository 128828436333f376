"""Picking tokens with numbers at float32's edges: denormal, huge, negative zero, largest, smallest, and NaN.

Also run over the native library that the address sanitizer watches (`make asan`): what these numbers once led to was a
read beside an array, which needs no wrong token to be one.
"""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from guanaco.kernels import Draw
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample
from support.kernels.providers import INTERPRETED, PROVIDERS, provider_ops

DRAWING = tuple(name for name in PROVIDERS if name != "reference")
NATIVE = tuple(name for name in DRAWING if name not in INTERPRETED)
VOCAB = 101
FORBIDDEN = (0, 5, 6, 8)
LARGEST, SMALLEST, DENORMAL = 3.4028234663852886e38, 1.1754943508222875e-38, 1.401298464324817e-45

TEMPERATURES = (0.0, -0.0, 5e-324, 7e-46, DENORMAL, 1e-40, SMALLEST, 1e-30, 1.0, 2.0, 1e30, LARGEST, 1e308)
TOP_PS = (5e-324, 7e-46, DENORMAL, 1e-40, SMALLEST, 1e-9, 0.5, 1 - 1e-9, 1 - 2**-53, 1.0)
TOP_KS = (0, 1, 2, VOCAB - 1, VOCAB, VOCAB + 1, 1000, 2**31 - 1)
MIN_PS = (0.0, -0.0, 5e-324, DENORMAL, SMALLEST, 1e-9, 0.3, 1 - 2**-53, 1.0)
UNIFORMS = (0.0, 5e-324, 1e-45, 0.3, 0.5, 1 - 2**-53)
ODD = (math.nan, -math.nan, math.inf, -math.inf, -1.0, -5e-324, 2.0, -1e308)


def logits_of(kind: str) -> Tensor:
    """A row [1, VOCAB] that a model could give, at one edge."""
    base = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    return {
        "usual": base * 3,
        "equal": torch.full((1, VOCAB), 1.5),
        "ties": base.round(),
        "huge": (base * 1e38).clamp(-LARGEST, LARGEST),
        "denormal": base * 1e-44,
        "largest and smallest": torch.where(base > 1, LARGEST, -LARGEST),
        "negative zeros": torch.where(base > 0, 0.0, -0.0),
    }[kind]


KINDS = ("usual", "equal", "ties", "huge", "denormal", "largest and smallest", "negative zeros")


def float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def worst_logits(kind: str) -> Tensor:
    """A row that the sampler would not hand to a provider, or one of a broken model."""
    row = logits_of("usual")
    if kind.startswith("all "):
        return torch.full_like(row, float(kind.removeprefix("all ")))
    row[0, [0, 50, VOCAB - 1]] = torch.tensor([math.nan, math.inf, -math.inf])[torch.tensor(list(map(int, kind)))]
    return row


fields = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from(TEMPERATURES),
        "top_p": st.sampled_from(TOP_PS),
        "top_k": st.sampled_from(TOP_KS),
        "min_p": st.sampled_from(MIN_PS),
        "presence_penalty": st.sampled_from([0.0, -0.0, 5e-324, DENORMAL, -2.0, 2.0]),
        "frequency_penalty": st.sampled_from([0.0, -0.0, 5e-324, -2.0, 2.0]),
        "repetition_penalty": st.sampled_from([1.0, 5e-324, DENORMAL, SMALLEST, 1e-9, 2.0]),
        "logit_bias": st.sampled_from([(), ((7, 100.0),), ((7, -100.0), (9, 5e-324)), ((3, -0.0),)]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)
rows_of = {"kind": st.sampled_from(KINDS), "rows": st.lists(fields, min_size=1, max_size=4)}
USUAL: dict[str, Any] = {"temperature": 1.0, "seed": 1}


def check_agreement(name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    """The provider draws the tokens of the sampler's own code. It may differ where e^x cannot tell two logits apart."""
    logits = logits_of(kind).expand(len(rows), -1).contiguous()
    # Four are forbidden. 97 are left, so that no share of equal weights falls on a top_p to the last bit (98 would: at
    # a temperature of 1e30 all weights are equal, and half of them are 49).
    common: dict[str, Any] = {"max_tokens": 9, "min_tokens": 9, "stop_token_ids": frozenset(FORBIDDEN)}
    given_rows = [SamplingRow(SamplingParams(**common, **one), (1, 2), [3, 3, 4]) for one in rows]
    found = sample(logits, given_rows, frozenset(), provider_ops(name))
    expected = sample(logits, given_rows, frozenset())
    for row, one, other in zip(logits, found, expected, strict=True):
        assert one.error is other.error is None, (one, other)
        assert one.token_id is not None
        assert other.token_id is not None
        assert one.token_id not in FORBIDDEN
        difference = (row[one.token_id] - row[other.token_id]).abs()
        apart = difference / row[other.token_id].abs().clamp(min=1.0)
        assert one.token_id == other.token_id or apart <= 1e-6, (one, other)


def agreement(names: tuple[str, ...], examples: int) -> Any:
    test = given(**rows_of)(check_agreement)
    flat = {"temperature": 1e30, "top_p": 0.5}
    for one in ({"top_p": 5e-324}, {"top_p": 7e-46}, {"top_p": 0.9, "min_p": -0.0}, {"temperature": 5e-324}, flat):
        test = example(kind="usual", rows=[{**USUAL, **one}])(test)
    return pytest.mark.parametrize("name", names)(settings(max_examples=examples, deadline=None)(test))


test_the_same_tokens_as_the_specification = agreement(NATIVE, 80)
test_the_same_tokens_as_the_specification_interpreted = agreement(INTERPRETED, 12)


@pytest.mark.parametrize("name", NATIVE)
def test_every_combination_of_filters_keeps_the_likeliest(name: str) -> None:
    """At noise 0 a filtered draw gives the first of the largest; at any noise a token with a weight."""
    for kind in ("usual", "equal", "ties", "huge"):
        logits = logits_of(kind)
        draws = [Draw(*one) for one in product((DENORMAL, 1.0, LARGEST), TOP_KS, TOP_PS, MIN_PS, UNIFORMS)]
        found = provider_ops(name).draw(logits.expand(len(draws), -1), draws)
        best = int(logits.argmax())
        for draw, token in zip(draws, found, strict=True):
            assert 0 <= token < VOCAB
            filtered = draw.top_k > 0 or float32(draw.top_p) < 1 or float32(draw.min_p) > 0
            if filtered and draw.temperature == 1.0 and draw.uniform == 0.0:
                assert token == best, draw
            if draw.temperature <= 1.0 and (draw.top_k == 1 or draw.top_p <= 1e-9):
                assert token == best, draw


@pytest.mark.parametrize("name", INTERPRETED)
def test_tiny_shares_keep_the_likeliest_in_the_interpreter(name: str) -> None:
    logits = logits_of("usual")
    draws = [Draw(1.0, 0, top_p, -0.0, 0.99) for top_p in TOP_PS[:6]] + [Draw(1.0, 0, 1.0, 1.0, 0.99)]
    assert set(provider_ops(name).draw(logits.expand(len(draws), -1), draws)) == {int(logits.argmax())}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("kind", ["usual", "all nan", "all -inf", "all inf", "000", "012", "222", "102", "201"])
def test_whatever_comes_a_token_of_the_vocabulary_is_drawn(name: str, kind: str) -> None:
    """Numbers that no request can hold, over rows that no model should give."""
    logits = logits_of(kind) if kind == "usual" else worst_logits(kind)
    draws = [
        Draw(temperature, top_k, top_p, min_p, uniform)
        for temperature in (*ODD, DENORMAL, 1.0)
        for top_k in (0, -1, -(2**31), 2**31 - 1, 3)
        for top_p in (*ODD, 0.0, -0.0, 5e-324, 0.9)
        for min_p in (*ODD, -0.0, 0.1)
        for uniform in (math.nan, -1.0, 1.0, 2.0, math.inf, 0.5)
    ]
    draws = draws[:: 7 if kind == "usual" else 53]
    for n in (1, 2, VOCAB):
        found = provider_ops(name).draw(logits[:, :n].expand(len(draws), -1), draws)
        assert 0 <= min(found) <= max(found) < n


@pytest.mark.parametrize("name", NATIVE)
def test_a_forbidden_token_is_never_drawn(name: str) -> None:
    """Not even at the hottest temperature, where a finite difference of logits weighs nothing."""
    logits = logits_of("equal")
    logits[0, :-1] = -math.inf
    draws = [Draw(*one) for one in product(TEMPERATURES, (0, 3), (5e-324, 0.9, 1.0), (-0.0, 0.5, 1.0), UNIFORMS)]
    assert set(provider_ops(name).draw(logits.expand(len(draws), -1), draws)) == {VOCAB - 1}
