"""Elo and Bradley-Terry against closed forms, a plain loop, and simulated players."""

import math

import numpy as np
import pytest

from guanaco.server.judging.ratings import START, K, Matches, bradley_terry, mean_elo, rate


def matches(rows: list[tuple[int, int, float, int]], players: int = 2) -> Matches:
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    first, second, prompt = (np.array(columns[i], dtype=np.intp) for i in (0, 1, 3))
    names = tuple("abcdefgh"[:players])
    return Matches(names, first, second, np.array(columns[2], dtype=np.float64), prompt)


def elo_of_one_order(rows: list[tuple[int, int, float, int]], players: int) -> list[float]:
    ratings = [START] * players
    for a, b, score, _ in rows:
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        ratings[a] += K * (score - expected)
        ratings[b] -= K * (score - expected)
    return ratings


def test_elo_of_one_match_is_half_of_k() -> None:
    mean, spread = mean_elo(matches([(0, 1, 1.0, 0)]), orders=3)
    assert mean.tolist() == [1016.0, 984.0]
    assert spread.tolist() == [0.0, 0.0]
    assert mean_elo(matches([(1, 0, 0.5, 0)]), orders=3)[0].tolist() == [1000.0, 1000.0]


def test_elo_is_the_mean_over_the_orders_of_a_plain_loop() -> None:
    """All 24 orders of four matches, each weighted by how often it comes: the vectorised mean comes close to them."""
    from itertools import permutations

    rows = [(0, 1, 1.0, 0), (1, 2, 1.0, 1), (2, 0, 0.5, 2), (0, 1, 0.0, 3)]
    exact = np.mean([elo_of_one_order(list(order), 3) for order in permutations(rows)], axis=0)
    mean, spread = mean_elo(matches(rows, 3), orders=20_000)
    assert np.abs(mean - exact).max() < 0.05
    assert mean.mean() == pytest.approx(START)
    exact_spread = np.std([elo_of_one_order(list(order), 3) for order in permutations(rows)], axis=0)
    assert np.abs(spread - exact_spread).max() < 0.05


def test_bradley_terry_of_two_players_has_a_closed_form() -> None:
    ratings = bradley_terry(np.array([[0.0, 750.0], [250.0, 0.0]]))
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), abs=0.1)
    assert ratings.mean() == pytest.approx(START)


def test_bradley_terry_finds_simulated_players_within_one_point() -> None:
    """Expected wins of 10^5 games between players of known strength: no bias above one point."""
    strength = np.array([1150.0, 1040.0, 980.0, 830.0])
    chance = 1 / (1 + 10 ** ((strength[None, :] - strength[:, None]) / 400))
    wins = chance * (100_000 / 6) * (1 - np.eye(4))
    assert np.abs(bradley_terry(wins) - strength).max() < 1


def test_a_player_who_never_loses_has_a_finite_rating() -> None:
    ratings = bradley_terry(np.array([[0.0, 160.0], [0.0, 0.0]]))
    assert np.isfinite(ratings).all()
    assert 1000 < ratings[0] - ratings[1] < 2000


def test_players_that_never_met_are_not_compared() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1], wins[1, 0], wins[2, 3], wins[3, 2] = 9, 1, 1, 1
    ratings = bradley_terry(wins)
    assert ratings[:2].mean() == pytest.approx(START, abs=0.1)
    assert ratings[2:] == pytest.approx([START, START], abs=0.1)


def test_the_interval_resamples_prompts_and_not_matches() -> None:
    """Ten matches on one prompt that all say the same are one observation: the interval must not shrink."""
    rng = np.random.default_rng(1)
    results = rng.integers(0, 2, 60).astype(float)
    once = matches([(0, 1, float(r), i) for i, r in enumerate(results)])
    tenfold = matches([(0, 1, float(r), i) for i, r in enumerate(results) for _ in range(10)])
    width = [np.diff(rate(m, replicates=400)[1][0])[0] for m in (once, tenfold)]
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_no_matches_at_all() -> None:
    nothing = matches([])
    assert mean_elo(nothing, orders=2)[0].tolist() == [START, START]
    assert rate(nothing)[0].tolist() == [START, START]
