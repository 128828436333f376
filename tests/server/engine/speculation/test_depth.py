"""How many draft tokens are worth their rows."""

from itertools import product
from random import Random

import pytest

from guanaco.server.engine.speculation.acceptance import FORCED, Acceptance, class_of
from guanaco.server.engine.speculation.costs import TYPICAL, StepCosts
from guanaco.server.engine.speculation.depth import MOST_SLOWDOWN, depths


def test_costs_lie_on_straight_lines_and_never_fall() -> None:
    costs = StepCosts([(4, 2.8), (1, 1.0), (8, 2.5), (16, 9.0)])
    assert costs.points == [(1, 1.0), (4, 2.5), (8, 2.5), (16, 5.0)], "disturbed: four rows, and sixteen"
    assert [costs.seconds(rows) for rows in (1, 2, 4, 6, 8, 12, 16, 24)] == pytest.approx(
        [1.0, 1.5, 2.5, 2.5, 2.5, 3.75, 5.0, 7.5]
    )
    assert [TYPICAL.seconds(rows) for rows in (1, 4, 8, 16)] == [1.0, 2.06, 3.28, 5.5]
    seconds = [TYPICAL.seconds(rows) for rows in range(1, 60)]
    assert seconds == sorted(seconds)


def test_one_stream_drafts_as_deep_as_its_chances_pay() -> None:
    """The measured costs of two cores: short drafts at most, unless a copy is nearly certain."""

    def depth(chance: float) -> int:
        return depths([[chance] * 15], 1, has_others=False, costs=TYPICAL)[0]

    assert depth(0.3) == 0
    assert 1 <= depth(0.6) <= 2
    assert 3 <= depth(0.85) <= 8
    assert depth(0.99) == 15


def test_a_wide_step_gets_no_drafts() -> None:
    assert depths([[0.95] * 15], 8, has_others=True, costs=TYPICAL) == [0]
    assert depths([[0.7] * 15] * 8, 8, has_others=False, costs=TYPICAL) == [0] * 8


def test_others_wait_hardly_longer() -> None:
    """A certain copy beside sequences without drafts: the step takes at most a twentieth longer."""
    flat = StepCosts([(1, 1.0), (101, 2.0)])  # a row costs a hundredth of a step
    (found,) = depths([[1.0] * 15], 2, has_others=True, costs=flat)
    assert found == int((MOST_SLOWDOWN - 1) * flat.seconds(2) / 0.01)
    assert depths([[1.0] * 15], 2, has_others=False, costs=flat) == [15]


@pytest.mark.parametrize("seed", range(6))
def test_the_division_is_the_best_of_all(seed: int) -> None:
    """Against every division of drafts of up to three tokens to three sequences, where none has to wait for others."""
    random = Random(seed)
    costs = StepCosts([(1, 1.0), (4, 1 + random.random()), (12, 2 + random.random())])
    chances = [[random.uniform(0.5, 1.0)] * 3 for _ in range(3)]

    def rate(division: tuple[int, ...]) -> float:
        expected = [sum(own[0] ** i for i in range(1, k + 1)) for own, k in zip(chances, division, strict=True)]
        seconds = costs.seconds(3 + sum(division))
        if (1 + min(expected)) * MOST_SLOWDOWN * costs.seconds(3) < seconds:
            return 0.0
        return (3 + sum(expected)) / seconds

    best = max(map(rate, product(range(4), repeat=3)))
    assert rate(tuple(depths(chances, 3, has_others=False, costs=costs))) >= best / 1.031


def test_chances_follow_what_was_seen() -> None:
    acceptance = Acceptance()
    before = acceptance.chance(class_of(2))
    for _ in range(60):
        acceptance.learn(class_of(2), is_right=False)
        acceptance.learn(class_of(9), is_right=True)
    assert acceptance.chance(class_of(3)) < 0.1 < before
    assert acceptance.chance(class_of(15)) > 0.97
    assert acceptance.chance(class_of(16)) == Acceptance().chance(class_of(99))
    for _ in range(60):
        acceptance.learn(class_of(2), is_right=True)
    assert acceptance.chance(class_of(2)) > 0.85, "what was seen long ago counts less"
    assert [class_of(length) for length in (1, 2, 3, 4, 7, 8, 15, 16, 1000)] == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert FORCED == 4
