"""One pair: both orders become one result, and results become a rate, an interval and a sentence."""

import math

import numpy as np
import pytest

from guanaco.server.judging.pairs import in_words, interval_of_mean, length_controlled, pair_result, prompts_needed
from guanaco.server.judging.stored import Verdict


def both(question: int, in_order: int | None, reversed_order: int | None) -> list[Verdict]:
    """The verdicts of one prompt: `a` first, then `b` first."""
    return [
        Verdict("mine", "a", "b", str(question), in_order),
        Verdict("mine", "b", "a", str(question), reversed_order),
    ]


@pytest.mark.parametrize(
    ("in_order", "reversed_order", "rate", "agreement"),
    [
        (1, 2, 1.0, 1.0),  # both for a
        (2, 1, 0.0, 1.0),
        (3, 3, 0.5, 1.0),
        (1, 1, 0.5, 0.0),  # always the first: a tie
        (1, 3, 0.5, 0.0),
        (1, None, 0.5, None),  # an unreadable verdict is neither a win nor a loss
        (None, None, 0.5, None),
    ],
)
def test_the_result_of_two_verdicts(
    in_order: int | None, reversed_order: int | None, rate: float, agreement: float | None
) -> None:
    verdicts = [v for q in range(30) for v in both(q, in_order, reversed_order)]
    result = pair_result(verdicts, "a", "b")
    assert (result.rate, result.agreement, result.prompts) == (rate, agreement, 30)
    assert result.unreadable == 30 * (in_order is None) + 30 * (reversed_order is None)
    mirrored = pair_result(verdicts, "b", "a")
    assert (mirrored.rate, mirrored.wins, mirrored.losses) == (1 - rate, result.losses, result.wins)
    assert result.is_better == mirrored.is_worse == (rate == 1)


def test_a_prompt_with_one_order_is_a_tie_where_others_have_both() -> None:
    verdicts = [v for q in range(20) for v in both(q, 1, 2)] + [Verdict("mine", "a", "b", "x", 1)]
    result = pair_result(verdicts, "a", "b")
    assert (result.one_order, result.wins, result.ties) == (1, 20, 1)


def test_people_who_see_each_prompt_once_are_taken_at_their_word() -> None:
    result = pair_result([Verdict("mine", "a", "b", str(q), 1) for q in range(25)], "a", "b")
    assert (result.rate, result.one_order, result.both_orders) == (1.0, 0, False)


def test_several_people_on_a_prompt_are_one_prompt() -> None:
    result = pair_result([*both(1, 1, 2), *both(1, 1, 1)], "a", "b")
    assert (result.prompts, result.rate, result.agreement) == (1, 0.75, 0.5)


def test_all_wins_get_the_exact_bound_of_a_share() -> None:
    assert interval_of_mean(np.ones(3)) == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    assert interval_of_mean(np.zeros(80)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 80)))
    assert interval_of_mean(np.array([])) == (0.0, 1.0)


def test_the_interval_of_many_results_is_the_normal_one() -> None:
    scores = np.array([0.0, 0.5, 1.0] * 100)
    low, high = interval_of_mean(scores)
    half = 1.96 * scores.std() / math.sqrt(300)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.01), pytest.approx(0.5 + half, abs=0.01))


def test_words() -> None:
    wins = [v for q in range(80) for v in both(q, 1, 2)]
    assert in_words(pair_result(wins, "a", "b")) == "a is better than b"
    assert in_words(pair_result(wins, "b", "a")) == "b is worse than a"
    few = pair_result(wins[:12], "a", "b")
    assert "no statement with 6 prompts" in in_words(few)
    assert not few.is_better
    mixed = [v for q in range(80) for v in (both(q, 1, 2) if q < 43 else both(q, 2, 1))]
    assert "not distinguishable with 80 prompts; about" in in_words(pair_result(mixed, "a", "b"))
    broken = [v for q in range(80) for v in (both(q, None, 2) if q < 40 else both(q, 1, 2))]
    assert "25% of the verdicts could not be read" in in_words(pair_result(broken, "a", "b"))
    assert not pair_result(broken, "a", "b").is_better
    first = [v for q in range(80) for v in both(q, 1, 1)]
    assert "more prompts are unlikely" in in_words(pair_result(first, "a", "b"))


def test_the_advised_number_finds_the_difference() -> None:
    """At the advised number the standard error is the difference divided by 2.8."""
    verdicts = [v for q in range(100) for v in (both(q, 1, 2) if q < 55 else both(q, 2, 1))]
    result = pair_result(verdicts, "a", "b")
    needed = prompts_needed(result)
    assert needed == 780  # (2.8 * 0.4975 / 0.05)^2 = 776.2, two digits, rounded up


def judged_by_length(effect: float, better: float, prompts: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Results of a judge who likes long answers (effect) and good ones (better, in log-odds); player a writes more."""
    rng = np.random.default_rng(3)
    differences = rng.normal(300, 400, prompts)
    chance = 1 / (1 + np.exp(-(better + effect * np.tanh(differences / differences.std()))))
    return (rng.random((prompts, 2)) < chance[:, None]).mean(axis=1), differences


def test_a_judge_of_lengths_alone_finds_no_difference_at_equal_lengths() -> None:
    scores, differences = judged_by_length(effect=3.0, better=0.0)
    low, high = interval_of_mean(scores)
    assert low > 0.6, "by its plain rate the longer one seems better"
    rate, (low, high) = length_controlled(scores, differences)
    assert low < rate < high
    assert low < 0.5 < high
    mirrored, _ = length_controlled(1 - scores, -differences)
    assert mirrored == pytest.approx(1 - rate, abs=1e-6)


def test_a_difference_that_is_there_stays_at_equal_lengths() -> None:
    rate, (low, high) = length_controlled(*judged_by_length(effect=3.0, better=1.0))
    assert low < 1 / (1 + math.exp(-1.0)) < high
    assert low > 0.5
    assert high - low < 0.2
    assert low < rate < high


def test_equal_lengths_change_no_rate() -> None:
    scores = np.array([1.0] * 60 + [0.5] * 10 + [0.0] * 30)
    rate, (low, high) = length_controlled(scores, np.zeros(100))
    assert rate == pytest.approx(0.65, abs=1e-3)
    plain = interval_of_mean(scores)
    assert (low, high) == (pytest.approx(plain[0], abs=0.01), pytest.approx(plain[1], abs=0.01))


@pytest.mark.parametrize("differences", [np.full(40, 900.0), np.linspace(-5, 5, 40), np.array([1e9] + [0.0] * 39)])
def test_wins_everywhere_stay_finite(differences: np.ndarray) -> None:
    rate, (low, high) = length_controlled(np.ones(40), differences)
    assert 0.9 < rate < 1
    assert 0.8 < low <= high < 1
    assert length_controlled(np.array([]), np.array([])) == (0.5, (0.0, 1.0))
