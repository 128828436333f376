"""The machine code of everything that the `triton` provider launches, held to kernels/analysis/budgets.json.

What is compiled is what the provider's own wrappers launch on a card of each target, recorded (triton_launches.py).
`make test` takes a part that has every kernel, `make accept` all launches of all targets.
"""

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from support.kernels.compiled_counts import LORA_ADAPTERS, LORA_RANK, LORA_ROWS, LORA_SIDE, counts

pytest.importorskip("triton")

from guanaco.kernels.analysis import compile as triton_compile
from guanaco.kernels.analysis.cards import hardest_card
from guanaco.kernels.triton.configs import TARGETS

BUDGETS = json.loads((files("guanaco.kernels.analysis") / "budgets.json").read_text())
ACCEPT_SECONDS = 1500  # a target's four hundred launches take five minutes on two busy cores
# What reads weights, keys, values or adapters: the bytes that a step's time is made of.
READERS = {
    "nf4_simt", "nf4_dot", "nf4_dequant", "lora_shrink", "lora_shrink_prompt", "decode_vector", "decode_dot", "prefill",
}  # fmt: skip
KERNELS = READERS | {
    "nf4_dot_finish", "nf4_dequant_finish", "decode_reduce", "rms_norm", "silu_mul", "scale_rows", "embedding",
    "rope_and_cache", "argmax_part", "argmax", "draw",
}  # fmt: skip

_SIMT = r"nf4_simt (1|2|4) 22016x4096 silu_mul fp32, [^,]*, [^,]*, [^,]*"
_ONE_ROW = r"nf4_simt 1 22016x4096 silu_mul fp32, [^,]*, [^,]*, [^,]*"
_DOT = r"nf4_dot (8|16) \d+x4096, .* stages"
_DOT_16 = r"nf4_dot 16 \d+x4096, .* stages"
_PREFILL = r"prefill 512 32/8 heads of 128, (b|f)[pf]16 cache.*"
QUICK = [
    *(f"{target}:{pattern}" for target in ("sm_80", "sm_90") for pattern in (_SIMT, _DOT, "lora")),
    *(f"{target}:{pattern}" for target in ("sm_86", "sm_89") for pattern in (_ONE_ROW, _DOT_16, "lora")),
    r"sm_80:nf4_simt 1 12288x4096 none bf16.* rank 8 unaligned",
    r"sm_80:nf4_dot 8 576x576, .*",
    r"sm_90:nf4_dot_finish (8|64) n 22016, .*, 8 adapters .*",
    r"sm_80:(nf4_dequant|lora_shrink_prompt) 512 (3 parts, k 4096|16777216).*",
    r"sm_90:decode_(vector 2|dot 8|dot 16) 32/(32|8) heads of 128, (bf16|i8) .*",
    r"sm_90:decode_vector 8 32/32 heads of 128, i8 .* 2 splits.*",
    r"sm_90:decode_dot 8 9/3 heads of 64, i8 .*",
    r"sm_90:prefill 512 32/8 heads of 128, (bf16|i8) .*",
    r"sm_86:decode_reduce 1 32 heads of 128, 32 .* bf16",
    r"sm_86:(rms_norm|scale_rows) 1 4096, [^y]* y fp16.*",
    r"sm_86:(silu_mul|embedding) 1 (11008|4096).*",
    r"sm_86:(argmax_part|argmax|draw) 1 .*",
    r"sm_86:rope_and_cache (1|8) 32/8 .* bf16 to (bf16|i8)",
    *(f"sm_75:{pattern}" for pattern in (_SIMT, r"nf4_dequant_finish 64 n 4096.*8 adapters.*", _PREFILL)),
    *(f"sm_100:{pattern}" for pattern in (_ONE_ROW, _DOT_16, _PREFILL)),
    *(f"sm_120:{pattern}" for pattern in (_ONE_ROW, _DOT, _PREFILL)),
]


@pytest.fixture(scope="module")
def counted(proof_count: Callable[[int, int], int], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compiled")
    if proof_count(0, 1) == 0:
        return counts(QUICK, folder)
    found = []
    for target in TARGETS:
        lora = [f"{target}:lora"] if target in BUDGETS["targets"] else []
        found += counts([f"{target}:.*", *lora], folder, timeout=ACCEPT_SECONDS)
    return found


def _cache(entry: dict[str, Any]) -> str:
    kind = entry["types"].get("k_cache", "")
    return {"*bf16": "16 bits", "*fp16": "16 bits", "*fp32": "32 bits"}.get(kind, "8 bits" if kind else "")


def _rows(entry: dict[str, Any]) -> int:
    """Of the tile that the batch is padded to."""
    return int(entry["constants"].get("ROWS", entry["constants"].get("COLUMNS", 1)))


def test_every_kernel_that_is_launched_is_known() -> None:
    """Found by how the wrappers are written; one that is left out here would never be compiled."""
    sources = [path.read_text() for path in (Path(triton_compile.__file__).parents[1] / "triton").rglob("*.py")]
    found = {
        name for text in sources for name in re.findall(r"^ +(?:launched = )?(\w+)\[(?:\(|grid\])", text, re.MULTILINE)
    }
    assert {name.removesuffix("_kernel") for name in found} == KERNELS


def test_every_kernel_is_among_them(counted: list[dict[str, Any]]) -> None:
    assert {e["kernel"] for e in counted} == KERNELS
    assert {e["target"] for e in counted} == set(TARGETS)


def test_nothing_spills_or_uses_local_memory_and_everything_fits(counted: list[dict[str, Any]]) -> None:
    wrong = [e for e in counted if {key: e[key] for key in BUDGETS["every_kernel"]} != BUDGETS["every_kernel"]]
    assert wrong == []
    assert [e for e in counted if not e["occupancy"] > 0] == []


def test_loads_are_wide(counted: list[dict[str, Any]]) -> None:
    """As many bytes come through loads of 16 as the weights (keys, values, matrices of adapters) have."""
    readers = [e for e in counted if e["kernel"] in READERS and e["constants"].get("ALIGNED", True)]
    for e in readers:
        # In short rows, whose only turn is counted with all that follows it, narrow loads of other things are as many.
        # Eight bits of a head of 64 are 64 bytes: two warps' tiles of them come 8 bytes at a time.
        if (e["kernel"] == "nf4_simt" and not e["has_loop"]) or (_cache(e), e["constants"].get("DIM")) == (
            "8 bits",
            64,
        ):
            continue
        assert e["load_width_bytes"] >= BUDGETS["load_width_bytes"], e


def test_issue_slots(counted: list[dict[str, Any]]) -> None:
    for budget in BUDGETS["issue_slots"]:
        held = [
            e for e in counted
            if e["kernel"] == budget["kernel"] and e["has_loop"] and e["target"] in BUDGETS["targets"]
            and budget.get("rows") in (None, _rows(e)) and budget.get("cache") in (None, _cache(e))
            and budget.get("head_dim") in (None, e["constants"].get("DIM"))
        ]  # fmt: skip
        assert held, budget
        for e in held:
            limit = budget["limit"].get(e["target"], budget["limit"]["default"])
            # Where there is a goal it is met, and to be kept.
            assert e["issue_slots_per_unit"] <= budget.get("goal", limit), (budget, e)


def test_the_one_row_loop_has_no_barrier_and_no_shared_memory(counted: list[dict[str, Any]]) -> None:
    budget = BUDGETS["one_row_loop"]
    held = [e for e in counted if e["kernel"] in ("nf4_simt", "decode_vector") and e["has_loop"]]
    assert held
    for e in (e for e in held if e["kernel"] == "nf4_simt" and _rows(e) == 1):
        assert {key: e[key] for key in budget} == budget, e
    for e in (e for e in held if e["kernel"] == "decode_vector"):
        assert (e["loop_barriers"], e["loop_shared_operations"]) == (0, 0), e


def test_decode_attention_is_bound_by_memory(counted: list[dict[str, Any]]) -> None:
    """On the hardest card of the target; but for 8-bit caches on B200, which has 4.4 slots for a byte, and for float32
    caches with `decode_dot`: tensor cores do not multiply float32, and only tests have such caches.

    Contexts that are cut into more parts do not fill the card, and what is around the loop is most of the code.
    """
    held = [e for e in counted if e["kernel"] in ("decode_vector", "decode_dot") and e["constants"]["SPLITS"] <= 8]
    assert held
    for e in held:
        bytes_of = {"16 bits": 2.0, "32 bits": 4.0, "8 bits": 1.0}[_cache(e)]
        is_exempt = (e["target"], bytes_of) == ("sm_100", 1.0) or (e["kernel"], bytes_of) == ("decode_dot", 4.0)
        if not is_exempt:
            assert e["kernel_slots_per_unit"] <= hardest_card(e["target"]).slots_per_unit(bytes_of), e


def test_tensor_cores_are_used_where_triton_has_code_for_them(counted: list[dict[str, Any]]) -> None:
    for e in counted:
        uses = e["kernel"] in ("nf4_dot", "lora_shrink_prompt", "decode_dot", "prefill") and _cache(e) != "32 bits"
        if uses or e["kernel"] == "nf4_simt":
            assert (e["tensor_core_instructions"] > 0) == (uses and e["target"] != "sm_75"), e


def test_pack_2_takes_the_two_places_of_one_word(counted: list[dict[str, Any]]) -> None:
    """In the PTX: see pack_proof.py."""
    held = [e for e in counted if e["kernel"] == "nf4_dot"]
    assert held
    assert [e for e in held if e["ungrouped"]] == []


def test_adapters_cost_what_they_read(counted: list[dict[str, Any]]) -> None:
    """An 8-row batch of 8 rank-16 adapters at n = k = 4096: instructions of all launches, shrink included."""
    lora = BUDGETS["lora"]
    assert (lora["rows"], lora["adapters"], lora["rank"]) == (LORA_ROWS, LORA_ADAPTERS, LORA_RANK)
    assert lora["in_features"] == lora["out_features"] == LORA_SIDE
    entries = [e for e in counted if "part" in e]
    for target in {e["target"] for e in entries}:
        total = {
            p: sum(e["slots"] for e in entries if (e["target"], e["part"]) == (target, p)) for p in ("base", "lora")
        }
        assert 1.0 < total["lora"] / total["base"] <= lora["kernel_slots_ratio"], target
    assert {e["target"] for e in entries} == {"sm_80", "sm_86", "sm_89", "sm_90"}
