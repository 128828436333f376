"""The machine code of the product for few rows, held to kernels/triton_budgets.json on every target."""

import json
from importlib.resources import files
from typing import Any

import pytest
from compiled_counts import counts

pytest.importorskip("triton")

BUDGETS = json.loads((files("guanaco.kernels") / "triton_budgets.json").read_text())
OTHERS = ("sm_75", "sm_100", "sm_120")  # compiled, and counted like the rest, though no budget is stated for them


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Gate and up at every number of rows, where budgets are stated and where ptxas came close to spilling; one row of
    q, k, v with an adapter elsewhere."""
    wanted = [f"nf4_simt:{target}:22016x4096" for target in (*BUDGETS["targets"], "sm_100")]
    wanted += [f"nf4_simt:{target}:12288x4096 none, rank" for target in OTHERS]
    return counts(wanted, tmp_path_factory.mktemp("compiled"))


def test_every_configuration_was_compiled(compiled: list[dict[str, Any]]) -> None:
    found = {(c["target"], c["rows"]) for c in compiled}
    assert found == {(t, r) for t in (*BUDGETS["targets"], "sm_100") for r in (1, 2, 4)} | {(t, 1) for t in OTHERS}


def test_issue_slots_per_weight(compiled: list[dict[str, Any]]) -> None:
    for budget in (b for b in BUDGETS["issue_slots_per_weight"] if b["kernel"] == "nf4_simt"):
        for c in (c for c in compiled if c["rows"] == budget["rows"]):
            limit = budget["limit"].get(c["target"], budget["limit"]["default"])
            # The goal is met, and to be kept: 3.44 and 3.45 for one row.
            assert c["issue_slots_per_unit"] <= budget.get("goal", limit), c


def test_nothing_spills_and_weights_come_in_wide_loads(compiled: list[dict[str, Any]]) -> None:
    for c in compiled:
        assert {key: c[key] for key in BUDGETS["every_kernel"]} == BUDGETS["every_kernel"], c
        assert c["load_width_bytes"] >= BUDGETS["weight_load_width_bytes"], c
        assert c["tensor_core_instructions"] == 0, c


def test_the_one_row_loop_has_no_barrier_and_no_shared_memory(compiled: list[dict[str, Any]]) -> None:
    budget = BUDGETS["one_row_loop"]
    for c in (c for c in compiled if c["rows"] == budget["rows"]):
        assert (c["loop_barriers"], c["loop_shared_operations"]) == (
            budget["barriers"],
            budget["shared_memory_operations"],
        ), c
        assert c["loop_shuffles"] == 0, c
