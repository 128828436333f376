"""The budgets that the data sheets give, against the table that was worked out by hand."""

import pytest

from guanaco.kernels.analysis import cards
from guanaco.kernels.triton.configs import TARGETS

_BYTES = 0.516  # of a double-quantised NF4 weight


@pytest.mark.parametrize(
    ("name", "slots"),
    [("H100 SXM", 4.6), ("A100 80 GB SXM", 4.9), ("RTX 4090", 21), ("RTX 3090", 9.8), ("L4", 26)],
)
def test_issue_slots_that_a_weight_may_cost(name: str, slots: float) -> None:
    card = next(card for card in cards.CARDS if card.name == name)
    assert card.slots_per_unit(_BYTES) == pytest.approx(slots, rel=0.02)


def test_every_target_has_a_card() -> None:
    assert {card.target for card in cards.CARDS} == set(TARGETS)
    assert cards.hardest_card("sm_89").name == "RTX 4090"
    with pytest.raises(KeyError, match="sm_70"):
        cards.hardest_card("sm_70")


@pytest.mark.parametrize("target", TARGETS)
def test_the_bound_changes_where_the_budget_ends(target: str) -> None:
    budget = cards.hardest_card(target).slots_per_unit(_BYTES)
    units = 4096 * 4096
    for share, bound in ((0.99, "memory"), (1.01, "issue")):
        slots = budget * share
        assert cards.predicted_bound(target, num_bytes=units * _BYTES, units=units, slots_per_unit=slots) == bound
