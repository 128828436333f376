"""The acceptance rows about load: a small one in each run, and all with their full counts under --accept.

Counts are asserted, times are recorded: `make accept` writes both.
"""

from collections.abc import Callable
from typing import Any

import pytest

from guanaco.server.commands.bench.serving.client import Exchange, Outcome
from guanaco.server.commands.bench.serving.runner import Due
from support.load import rows_of_faults, rows_of_hub, rows_of_load
from support.load.oracle import Oracle, body
from support.load.rows_of_load import Finding
from support.server.engine_server import text_of
from support.server.fake_engine import BOS


def test_many_streams_at_once_lose_and_mix_up_nothing() -> None:
    """24 adapters share 4 slots, so requests wait for their adapters' turns; every token of every answer is checked."""
    finding = rows_of_load.streams_at_once(streams=80, adapters=24, slots=4, tokens=8, runs=1)
    assert finding.problems == []
    assert finding.counts == {"completed": 80, "tokens checked": 640}


def test_a_wrong_token_a_lost_one_and_a_doubled_one_are_found() -> None:
    oracle = Oracle()
    oracle.versions = {"a0": "one", "a1": "two"}
    right = text_of((BOS, *b"what?"), "one", 6)
    plan = [Due(0.0, "a0", body("a0", "what?", 6))]

    def wrong(text: str, tokens: int = 6, outcome: Outcome = Outcome.COMPLETED) -> int:
        given = Exchange(0, "a0", 0.0, text=text, completion_tokens=tokens, outcome=outcome)
        return len(oracle.wrong(plan, [given]))

    assert wrong(right) == 0
    assert wrong(right[:-1]) == wrong(right[:3] + right[2:]) == wrong(right[::-1]) == 1
    assert wrong(text_of((BOS, *b"what?"), "two", 6)) == 1, "another adapter's"
    assert wrong(right, tokens=5) == 1
    assert wrong("", outcome=Outcome.REFUSED) == 0
    oracle.close()


def test_a_target_that_is_missed_is_listed_and_nothing_more() -> None:
    finding = Finding("X", times={"slow": 3.0, "quick": 1.0}, targets={"slow": 2.0, "quick": 2.0, "unknown": 1.0})
    assert (finding.missed, finding.problems) == (["slow: 3.0 > 2.0"], [])
    finding.must(False, "lost")
    assert finding.told()["problems"] == ["lost"]


FULL: dict[str, tuple[Callable[..., Finding], dict[str, Any]]] = {
    "L1": (rows_of_load.streams_at_once, {}),
    "L2": (rows_of_faults.real_engine, {}),
    "L3": (rows_of_load.idle_connections, {}),
    "L4": (rows_of_load.overload, {}),
    "L5": (rows_of_load.ramp_and_bursts, {}),
    "L6": (rows_of_faults.soak, {"seconds": 120.0}),  # `loadtest/rows.py L6` takes ten minutes
    "L7": (rows_of_load.cancellations, {}),
    "L8": (rows_of_faults.scheduling, {}),
    "L9": (rows_of_load.freeze, {}),
    "A6": (rows_of_hub.hub_faults, {}),
    "F-i": (rows_of_faults.clock, {}),
    "F-l": (rows_of_faults.fairness, {}),
}


@pytest.mark.accept
@pytest.mark.parametrize("row", FULL)
def test_the_row_holds_with_its_full_counts(row: str, record_property: Callable[[str, object], None]) -> None:
    function, options = FULL[row]
    finding = function(**options)
    record_property(f"row {row}", finding.told())
    assert finding.problems == []
