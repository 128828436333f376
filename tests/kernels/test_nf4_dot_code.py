"""What `nf4_dot` costs on GPUs that are not here: machine code within triton_budgets.json, and what pack=2 groups."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from compiling import run_compiling

pytest.importorskip("triton")

from guanaco.kernels import nf4_dot
from guanaco.kernels.pack_proof import ungrouped

_SCRIPT = Path(__file__).parent.parent / "support" / "count_dot.py"
BUDGETS = json.loads((files("guanaco.kernels") / "triton_budgets.json").read_text())
_OF_16_ROWS = [f"{target}:{rows}" for target in BUDGETS["targets"] for rows in (8, 16)]
_OTHERS = [
    *("sm_80:32", "sm_80:64", "sm_90:64", "sm_80:odd k", "sm_90:8 rows of odd k", "sm_80:float32 scales"),
    *("sm_100:16", "sm_120:8", "sm_120:16"),
]
_FINISH = ["sm_80:finish", "sm_80:finish with adapters", "sm_90:finish gate and up", "sm_100:finish 16"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    process = run_compiling([str(_SCRIPT), *_OF_16_ROWS, *_OTHERS, *_FINISH], tmp_path_factory.mktemp("compiled"))
    assert process.returncode == 0, process.stderr
    found: dict[str, dict[str, Any]] = json.loads(process.stdout)
    return found


@pytest.mark.parametrize("name", _OF_16_ROWS + _OTHERS + _FINISH)
def test_no_spills_and_no_local_memory(counted: dict[str, dict[str, Any]], name: str) -> None:
    for key, limit in BUDGETS["every_kernel"].items():
        assert counted[name][key] <= limit


@pytest.mark.parametrize("name", _OF_16_ROWS)
def test_issue_slots_per_weight(counted: dict[str, dict[str, Any]], name: str) -> None:
    """Double-quantised scales decoded on the fly; 5 to 16 rows have one limit, and the goal is met."""
    (budget,) = (b for b in BUDGETS["issue_slots_per_weight"] if b["kernel"] == "nf4_dot")
    limits = budget["limit"]
    slots = counted[name]["issue_slots_per_unit"]
    assert slots <= limits.get(name.split(":")[0], limits["default"])
    assert slots <= budget["goal"]


@pytest.mark.parametrize("name", _OF_16_ROWS + _OTHERS)
def test_weights_come_16_bytes_at_a_time_and_are_multiplied_by_tensor_cores(
    counted: dict[str, dict[str, Any]], name: str
) -> None:
    """As many bytes come through 16-byte loads as the weights are; the activations come through narrower ones."""
    assert counted[name]["wide_bytes"] >= counted[name]["weight_bytes"]
    assert counted[name]["tensor_core_instructions"] > 0
    if name in _OF_16_ROWS:
        assert counted[name]["load_width_bytes"] >= BUDGETS["weight_load_width_bytes"]


@pytest.mark.parametrize("name", _OF_16_ROWS + _OTHERS)
def test_pack_2_takes_the_two_places_of_one_word(counted: dict[str, dict[str, Any]], name: str) -> None:
    assert counted[name]["ungrouped"] == []


def test_adapters_cost_what_they_read(counted: dict[str, dict[str, Any]]) -> None:
    """An 8-row batch of 8 rank-16 adapters at n = k = 4096: both kernels' instructions with and without."""
    lora = BUDGETS["lora"]
    assert (lora["rows"], lora["adapters"], lora["rank"]) == (8, 8, 16)
    assert lora["in_features"] == lora["out_features"] == 4096
    product = counted["sm_80:8"]["slots"]
    ratio = (product + counted["sm_80:finish with adapters"]["slots"]) / (product + counted["sm_80:finish"]["slots"])
    assert 1.0 < ratio <= lora["kernel_slots_ratio"]


_GROUPED = """
// pair %r1 %r1 to %r11 %r12 %r13 %r14
// pair %r2 %r2 to %r21 %r22 %r23 %r24
// pair %r3 %r3 to %r31 %r32 %r33 %r34
// pair %r4 %r4 to %r41 %r42 %r43 %r44
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r5, %r6, %r7, %r8 }, { %r11, %r21, %r31, %r41 }, { %r9, %r9 }, { %r5, %r6, %r7, %r8 };
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r5, %r6, %r7, %r8 }, { %r12, %r22, %r32, %r42 }, { %r9, %r9 }, { %r5, %r6, %r7, %r8 };
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r5, %r6, %r7, %r8 }, { %r13, %r23, %r33, %r43 }, { %r9, %r9 }, { %r5, %r6, %r7, %r8 };
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r5, %r6, %r7, %r8 }, { %r14, %r24, %r34, %r44 }, { %r9, %r9 }, { %r5, %r6, %r7, %r8 };
"""  # noqa: E501


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", ""),
        ("pair %r1 %r1", "pair %r1 %r2", "two words"),
        ("{ %r11, %r21", "{ %r12, %r21", "not decoded as it stands"),
        ("{ %r11, %r21", "{ %r99, %r21", "not decoded as it stands"),
        ("mma.sync", "wgmma", "0 products"),
    ],
)
def test_the_proof_can_fail(old: str, new: str, complaint: str) -> None:
    wrong = ungrouped(_GROUPED.replace(old, new) if old else _GROUPED)
    assert complaint in " ".join(wrong) if complaint else wrong == []


class _Launched:
    """What launching a kernel on a GPU returns, as far as it is used."""

    def __init__(self, ptx: str, name: str) -> None:
        self.asm = {"ptx": ptx}
        self.hash = name


def test_a_variant_without_the_proof_is_refused() -> None:
    nf4_dot._require_proof(_Launched(_GROUPED, "right"))
    with pytest.raises(RuntimeError, match="than was proven: a pair of two words"):
        nf4_dot._require_proof(_Launched(_GROUPED.replace("pair %r1 %r1", "pair %r1 %r2"), "wrong"))
