"""Drawing tokens: the distribution, each filter against brute force, and that no row depends on another."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.constraints import AllowedTokens, StepMasks
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample, token_logprobs, uniform

EOS = frozenset({2})
DRAW = SamplingParams(max_tokens=10, seed=0)
GREEDY = replace(DRAW, temperature=0.0)


def row(params: SamplingParams, prompt: tuple[int, ...] = (), output: list[int] | None = None) -> SamplingRow:
    return SamplingRow(params, prompt, output or [])


def draw(logits: Tensor, params: SamplingParams, count: int) -> list[int]:
    """`count` tokens of one distribution, each with a seed of its own."""
    rows = [row(replace(params, seed=seed)) for seed in range(count)]
    return [token.token_id for token in sample(logits.expand(count, -1), rows, EOS)]  # type: ignore[misc]


def logits_of(seed: int, size: int, spread: float = 2.0) -> Tensor:
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * spread


def allowed(logits: Tensor, params: SamplingParams) -> set[int]:
    """The tokens that pass the filters, worked out in float64, one by one."""
    scaled = logits[0].double() / params.temperature
    probabilities = torch.softmax(scaled - scaled.max(), dim=0).tolist()
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    kept, mass = set(), 0.0
    for rank, token in enumerate(order):
        if params.top_k and rank >= params.top_k:
            break
        if params.top_p < 1.0 and mass >= params.top_p:
            break
        if probabilities[token] < params.min_p * probabilities[order[0]]:
            break
        kept.add(token)
        mass += probabilities[token]
    return kept or {order[0]}


@pytest.mark.parametrize("params", [DRAW, replace(DRAW, temperature=0.5), replace(DRAW, temperature=1.7)])
def test_tokens_come_as_often_as_the_softmax_says(params: SamplingParams) -> None:
    logits, count = logits_of(0, 12), 20_000
    expected = torch.softmax(logits[0].double() / params.temperature, dim=0) * count
    seen = torch.bincount(torch.tensor(draw(logits, params, count)), minlength=12).double()
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 31.3, "11 degrees of freedom: one in a thousand"
    shuffled = expected.roll(1)
    assert float(((seen - shuffled) ** 2 / shuffled).sum()) > 1000, "this test could not fail"


@given(
    seed=st.integers(0, 10**6), size=st.sampled_from([3, 17, 200, 3000]), top_k=st.sampled_from([0, 1, 2, 7, 50]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]), min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]), spread=st.sampled_from([0.01, 1.0, 5.0]),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_filters_keep_what_brute_force_keeps(
    seed: int, size: int, top_k: int, top_p: float, min_p: float, temperature: float, spread: float
) -> None:
    params = replace(DRAW, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    logits = logits_of(seed, size, spread)
    permitted = allowed(logits, params)
    seen = set(draw(logits, params, 64))
    # Sums in float32 may put one token more or less on the edge of top_p into a nearly flat distribution.
    assert len(seen - permitted) <= (top_p < 1.0 and spread < 0.1)
    if len(permitted) <= 2 and spread >= 1.0:
        assert seen <= permitted
        assert seen


def test_more_candidates_than_are_looked_at_first() -> None:
    """A flat distribution under top_p: the filter ends far behind the first thousand."""
    logits = torch.zeros(1, 5000)
    seen = set(draw(logits, replace(DRAW, top_p=0.8), 4000))
    assert max(seen) < 4000 + 2
    assert len(seen) > 2000
    assert set(draw(logits, replace(DRAW, top_k=3), 200)) == {0, 1, 2}, "of equal tokens the lowest ids"


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.05])
def test_a_tiny_temperature_is_argmax_and_never_infinite(temperature: float) -> None:
    logits = logits_of(3, 500) * 50
    assert set(draw(logits, replace(DRAW, temperature=temperature), 50)) == {int(logits.argmax())}


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0], [7.0, 7.0, 7.0, 7.0]])
    assert [t.token_id for t in sample(logits, [row(GREEDY), row(GREEDY)], EOS)] == [1, 0]


def test_a_row_depends_on_nothing_but_itself() -> None:
    """In any company and any order the same token, whatever the others ask for."""
    kinds = [
        DRAW, GREEDY, replace(DRAW, top_p=0.9), replace(DRAW, top_k=5, temperature=0.7), replace(DRAW, min_p=0.1),
        replace(DRAW, repetition_penalty=1.3), replace(DRAW, logit_bias=((3, 5.0),)), replace(DRAW, logprobs=2),
        replace(DRAW, presence_penalty=1.0, frequency_penalty=0.5), replace(DRAW, min_tokens=9),
    ]  # fmt: skip
    rows = [row(replace(params, seed=i), (1, 2, 3), [4, 5] * (i % 3)) for i, params in enumerate(kinds)]
    logits = torch.cat([logits_of(i, 300) for i in range(len(rows))])
    alone = [sample(logits[i : i + 1], [r], EOS)[0] for i, r in enumerate(rows)]
    assert sample(logits, rows, EOS) == alone
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    assert sample(logits[order], [rows[i] for i in order], EOS) == [alone[i] for i in order]


def test_the_draw_is_a_function_of_seed_and_position() -> None:
    numbers = {(seed, position): uniform(seed, position) for seed in range(40) for position in range(40)}
    assert len(set(numbers.values())) == 1600
    assert all(0.0 <= u < 1.0 for u in numbers.values())
    assert abs(sum(numbers.values()) / 1600 - 0.5) < 0.03
    assert uniform(-(2**63), 0) != uniform(2**63 - 1, 0)
    logits = logits_of(0, 50)
    first = sample(logits, [row(DRAW, (), [1])], EOS)[0]
    assert sample(logits, [row(DRAW, (9, 9), [7])], EOS)[0] == first, "position counts, not what was written"


def test_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = logits_of(5, 40), [1, 5, 5, 9, 30]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())
    params = replace(GREEDY, repetition_penalty=1.7)
    for bias in range(0, 40, 3):  # argmax under each of several biases shows the whole row
        biased = replace(params, logit_bias=((bias, 3.0),))
        expected_biased = expected.clone()
        expected_biased[0, bias] += 3.0
        got = sample(logits, [row(biased, (1, 5), [5, 9, 30])], EOS)[0].token_id
        assert got == int(expected_biased.argmax())


def test_presence_and_frequency_count_the_output_only() -> None:
    """OpenAI's formula: logit − count · frequency − (count > 0) · presence."""
    logits = torch.tensor([[1.0, 1.1, 1.2, 1.3]])
    params = replace(GREEDY, presence_penalty=0.15, frequency_penalty=0.1)
    assert sample(logits, [row(params, (3, 3, 3), [])], EOS)[0].token_id == 3
    assert sample(logits, [row(params, (), [3])], EOS)[0].token_id == 2  # 1.3 − 0.25 = 1.05
    assert sample(logits, [row(params, (), [3, 2, 1])], EOS)[0].token_id == 3  # 1.05 against 1.0, 0.95, 0.85
    assert sample(logits, [row(params, (), [3, 3, 2, 1])], EOS)[0].token_id == 0


def test_no_end_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0]])
    params = replace(GREEDY, min_tokens=2, stop_token_ids=frozenset({3}))
    assert [sample(logits, [row(params, (), [5] * n)], EOS)[0].token_id for n in range(3)] == [1, 1, 2]
    ignoring = replace(params, ignore_eos=True)
    assert sample(logits, [row(ignoring)], EOS)[0].token_id == 2, "an eos that does not end is a token like others"


@pytest.mark.parametrize("params", [GREEDY, DRAW, replace(DRAW, top_p=0.5)])
def test_a_bias_of_a_hundred_decides(params: SamplingParams) -> None:
    logits = logits_of(1, 30)
    best = int(logits.argmax())
    assert set(draw(logits, replace(params, logit_bias=((4, 100.0),)), 30)) == {4}
    assert best not in draw(logits, replace(params, logit_bias=((best, -100.0),)), 200)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, DRAW, replace(DRAW, top_p=0.9, logprobs=1)])
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: SamplingParams) -> None:
    logits = torch.cat([logits_of(i, 20) for i in range(3)])
    expected = sample(logits, [row(params)] * 3, EOS)
    logits[1, 7] = bad
    first, failed, last = sample(logits, [row(params)] * 3, EOS)
    assert (first, last) == (expected[0], expected[2])
    assert (failed.token_id, failed.error) == (None, ErrorCode.NUMERICAL_ERROR)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = logits_of(2, 64)
    expected = torch.log_softmax(logits[0].double(), dim=0)
    params = replace(GREEDY, logprobs=5, repetition_penalty=1.9, logit_bias=((7, 100.0),))
    token = sample(logits, [row(params, (1, 2), [3])], EOS)[0]
    assert token.token_id == 7
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert [i for i, _ in token.logprob.top] == expected.argsort(descending=True)[:5].tolist()
    values = [value for _, value in token.logprob.top]
    assert values == sorted(values, reverse=True)


def test_the_likeliest_token_has_one_number() -> None:
    """lm-eval calls an answer greedy if its log-probability equals the largest of the top ones exactly."""
    logits = torch.cat([logits_of(i, 1000) for i in range(5)])
    ids = logits.argmax(dim=-1).tolist()
    for found in token_logprobs(logits, ids, [1, 2, 3, 0, 5]):
        assert not found.top or found.top[0] == (found.token_id, found.logprob)
    assert [len(found.top) for found in token_logprobs(logits, ids, [1, 2, 3, 0, 5])] == [1, 2, 3, 0, 5]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10), [], EOS) == []


@pytest.mark.parametrize("temperature", [-0.0, 5e-324, 7e-46, 1.4e-45, 1e-40, 1.2e-38])
@pytest.mark.parametrize("filters", [{}, {"top_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1000, "min_p": -0.0}])
def test_a_temperature_below_float32_is_argmax(temperature: float, filters: dict[str, float]) -> None:
    """It became 0 in float32, and 0 / 0 is no number."""
    logits = logits_of(3, 50)
    assert set(draw(logits, replace(DRAW, temperature=temperature, **filters), 20)) == {int(logits.argmax())}  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [5e-324, 7e-46, 1.4e-45, 1e-40, 1.2e-38, 1e-9])
@pytest.mark.parametrize("params", [GREEDY, DRAW, replace(DRAW, top_p=0.9, logprobs=1)])
def test_a_tiny_repetition_penalty_leaves_numbers(penalty: float, params: SamplingParams) -> None:
    """Quotients that overflow are the largest float32; a logit of 0 stays 0."""
    logits = torch.tensor([[0.0, 3.0, -1.0, 2.0, -0.0]])
    rows = [row(replace(params, repetition_penalty=penalty, seed=seed), (0, 2, 3), [4]) for seed in range(20)]
    tokens = sample(logits.expand(20, -1), rows, EOS)
    assert {(token.token_id, token.error) for token in tokens} == {(3, None)}, "the one that is seen and positive"


def test_a_row_of_huge_numbers_is_finite() -> None:
    """Their sum overflows; none of them does."""
    logits = torch.tensor([[3e38, 2.9e38, 3.1e38, -3e38], [0.0, 1.0, math.inf, 0.0]])
    first, second = sample(logits, [row(GREEDY)] * 2, EOS)
    assert (first.token_id, first.error) == (2, None)
    assert second.error == ErrorCode.NUMERICAL_ERROR


def test_bans_that_leave_nothing_are_none() -> None:
    """min_tokens over a vocabulary of which every token is an end: one is drawn, and does not end the request."""
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    for params in (GREEDY, DRAW, replace(DRAW, top_p=0.9)):
        token = sample(logits, [row(replace(params, min_tokens=3, stop_token_ids=frozenset({0, 1})))], EOS)[0]
        assert token.error is None
        assert token.token_id in (0, 1, 2)


def test_ends_beyond_the_logits_are_left_out() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0]])
    assert sample(logits, [row(replace(GREEDY, min_tokens=3))], frozenset({2, 3, 32_000}))[0].token_id == 1


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_an_id_that_is_no_token_is_an_error_of_its_row(wrong: int) -> None:
    """Whatever a provider returns: the next step would read the embedding there."""

    class Faulty:
        def draw(self, logits: Tensor, draws: object) -> list[int]:
            return [1, wrong]

    logits = torch.tensor([[0.0, 1.0, 5.0]] * 2)
    first, second = sample(logits, [row(DRAW), row(replace(DRAW, logprobs=1))], EOS, Faulty())
    assert (first.token_id, first.error) == (1, None)
    assert (second.token_id, second.error) == (None, ErrorCode.NUMERICAL_ERROR)


def test_ranks_count_what_is_likelier() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    for token, ranks in ((0, (4, 1)), (1, (1, 1)), (2, (3, 1))):
        found = token_logprobs(logits, [token] * 2, [0, 0], with_ranks=True)
        assert tuple(item.rank for item in found) == ranks


class Provider:
    """A kernel provider that draws: it sees what is left of the logits."""

    def draw(self, logits: Tensor, draws: list) -> list[int]:
        self.left = [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in logits]
        return logits.argmax(dim=-1).tolist()


def left_of(rows: list[SamplingRow], vocab: int, masks: StepMasks | None = None) -> list[set[int]]:
    provider = Provider()
    sample(logits_of(3, vocab).expand(len(rows), -1), rows, EOS, provider, masks)
    return provider.left


@pytest.mark.parametrize("vocab", [5, 32, 70])
def test_only_allowed_tokens_are_left_and_in_their_own_row(vocab: int) -> None:
    ids = {0, 3, vocab - 1}
    free, bound = row(GREEDY), row(replace(GREEDY, allowed=AllowedTokens.of(ids)))
    assert left_of([free, bound, free], vocab) == [set(range(vocab)), ids, set(range(vocab))]
    assert set(draw(logits_of(4, vocab, 0.1), replace(DRAW, allowed=AllowedTokens.of(ids)), 300)) == ids


def test_allowed_tokens_and_what_else_is_forbidden() -> None:
    """The end stays where it is all that is allowed; a mask and allowed tokens both hold where both can."""
    early = replace(GREEDY, min_tokens=5)
    ends = [row(replace(early, allowed=AllowedTokens.of(ids))) for ids in ({2}, {2, 4})]
    assert left_of(ends, 8) == [{2}, {4}]
    masks = StepMasks((0, 1), np.array([[0b0110], [0b0110]], dtype=np.int32), {})
    both = [row(replace(GREEDY, allowed=AllowedTokens.of(ids))) for ids in ({1, 5}, {5})]
    assert left_of([*both, row(GREEDY)], 8, masks) == [{1}, {1, 2}, set(range(8))]


def test_bad_words_lose_their_last_token_where_the_others_were_drawn() -> None:
    params = replace(GREEDY, bad_words=((7,), (4, 5, 6), (5, 0)))
    every = set(range(8))
    for output, banned in (([], {7}), ([4], {7}), ([4, 5], {7, 6, 0}), ([4, 5, 1], {7}), ([5], {7, 0})):
        assert left_of([row(params, prompt=(4, 5), output=output)], 8) == [every - banned]
    assert left_of([row(replace(GREEDY, bad_words=tuple((i,) for i in range(8))))], 8) == [every], "one must be drawn"
    allowed = replace(params, allowed=AllowedTokens.of({6, 7}))
    assert left_of([row(allowed, output=[4, 5])], 8) == [{6, 7}]
    assert left_of([row(allowed, output=[4])], 8) == [{6}]
