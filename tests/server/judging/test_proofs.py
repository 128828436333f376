"""The statistics prove themselves: coverage, coin flips, and planted bugs that the proofs must find."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from guanaco.server.judging import pairs
from guanaco.server.judging.pairs import interval_of_mean, pair_result
from guanaco.server.judging.replay import benchmark_statistics
from guanaco.server.judging.stored import Verdict


def both_orders(question: int, in_order: int | None, reversed_order: int | None) -> list[Verdict]:
    return [
        Verdict("mine", "a", "b", str(question), in_order),
        Verdict("mine", "b", "a", str(question), reversed_order),
    ]


def test_a_coin_that_judges_equals_covers_one_half_in_180_to_198_of_200_runs() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for run in range(200):
        flips = rng.integers(1, 3, size=(80, 2))
        verdicts = [v for q in range(80) for v in both_orders(q, int(flips[q, 0]), int(flips[q, 1]))]
        low, high = pair_result(verdicts, "a", "b", replicates=400, seed=run).interval
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 198


def test_the_bootstrap_covers_the_truth_in_93_to_97_percent(proof_count: Callable[[int, int], int]) -> None:
    """Studies of 200 prompts whose results have a known mean; the prompts differ in how sure their result is."""
    studies = proof_count(150, 1000)
    low_share, high_share = (0.93, 0.97) if studies == 1000 else (0.90, 0.99)  # three standard errors of 150 studies
    rng = np.random.default_rng(11)
    covered = 0
    for study in range(studies):
        chance = rng.beta(2.4, 1.6, size=200)  # of a win on each prompt: the mean is 0.6
        scores = (rng.random((200, 2)) < chance[:, None]).mean(axis=1)  # two orders: 0, one half, 1
        low, high = interval_of_mean(scores, replicates=400, seed=study)
        covered += low <= 0.6 <= high
    assert low_share <= covered / studies <= high_share


# A study whose result is known: `a` wins 30 prompts in both orders, loses 10, the judge prefers the first place in 20,
# and one verdict of 5 prompts cannot be read.
KNOWN = [
    *(v for q in range(30) for v in both_orders(q, 1, 2)),
    *(v for q in range(30, 40) for v in both_orders(q, 2, 1)),
    *(v for q in range(40, 60) for v in both_orders(q, 1, 1)),
    *(v for q in range(60, 65) for v in both_orders(q, None, 2)),
]


def facts(verdicts: list[Verdict]) -> dict[str, object]:
    told = benchmark_statistics(verdicts, orders=20, replicates=50)["mine"]
    (pair,) = told["pairs"]
    return {name: pair[name] for name in ("player", "wins", "ties", "losses", "unreadable", "agreement")} | {
        "warnings": len(told["warnings"]),
        "a_is_ahead": told["players"]["a"]["bradley_terry"] > told["players"]["b"]["bradley_terry"],
    }


TRUTH = {
    "player": "a", "wins": 30, "ties": 25, "losses": 10, "unreadable": 5, "agreement": round(40 / 60, 4),
    "warnings": 0, "a_is_ahead": True,
}  # fmt: skip


def test_the_known_study() -> None:
    assert facts(KNOWN) == TRUTH


def _swapped(v: Verdict) -> Verdict:
    return replace(v, verdict={1: 2, 2: 1}.get(v.verdict or 0, v.verdict))


@pytest.mark.parametrize(
    "plant",
    [
        lambda: [_swapped(v) for v in KNOWN],  # labels swapped everywhere
        lambda: [_swapped(v) if v.first == "b" else v for v in KNOWN],  # swapped in one order only
        lambda: [v for v in KNOWN if v.first == "a"],  # one order dropped
        lambda: [v for v in KNOWN if v.first == "a" or int(v.question) % 2],  # dropped for half of the prompts
        lambda: [replace(v, verdict=2 if v.verdict is None else v.verdict) for v in KNOWN],  # unreadable: a loss
        lambda: [v for v in KNOWN if v.verdict is not None],  # unreadable: dropped
    ],
)
def test_planted_bugs_in_the_data_are_found(plant: Callable[[], list[Verdict]]) -> None:
    assert facts(plant()) != TRUTH


def test_a_planted_bug_in_the_rule_of_two_orders_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that takes the first order's word finds another number of wins."""
    original = pairs.prompt_results

    def first_order_only(verdicts: list[Verdict], player: str) -> object:
        return original([v for v in verdicts if v.first == player], player)

    monkeypatch.setattr(pairs, "prompt_results", first_order_only)
    assert facts(KNOWN) != TRUTH
