"""The counter of machine code, on kernels with a loop that was counted by eye and with planted faults."""

import dataclasses
import json
from typing import Any

import pytest

from guanaco.kernels.analysis import compile as triton_compile
from guanaco.kernels.analysis import sass
from guanaco.kernels.analysis.compile import CompileCase, occupancy
from support.kernels.compiling import run_compiling

pytest.importorskip("triton")

_WANTED = [
    *(f"{name}:{target}" for target in ("sm_80", "sm_90") for name in ("sum", "narrow", "barrier", "product", "wrong")),
    "registers:sm_80",
    "product:sm_75",
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compiled")
    process = run_compiling(["-m", "support.kernels.planted_kernels", *_WANTED], folder)
    assert process.returncode == 0, process.stderr
    assert not list((folder / "cache").glob("*")), "compiling left files in the cache"
    found: dict[str, dict[str, Any]] = json.loads(process.stdout)
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_loop_that_was_counted_by_eye(planted: dict[str, dict[str, Any]], target: str) -> None:
    """34 instructions in the disassembly: 4 loads of 4 numbers a lane, so four of the source's turns, 16 numbers."""
    found = planted[f"sum:{target}"]
    assert (found["loop_instructions"], found["unrolled"]) == (34, 4)
    assert found["issue_slots_per_unit"] == 34 / 16
    assert found["load_width_bytes"] == 16
    assert (found["spills"], found["local_bytes"], found["loop_barriers"], found["loop_shared_operations"]) == (0,) * 4
    # 4,096 numbers are 8 turns of 34, so 272 instructions for 128 numbers a lane, and what stands around the loop.
    assert 272 / 128 < found["kernel_slots_per_unit"] < 1.3 * 272 / 128


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_planted_faults_are_found(planted: dict[str, dict[str, Any]], target: str) -> None:
    assert planted[f"narrow:{target}"]["load_width_bytes"] == 4
    barrier = planted[f"barrier:{target}"]
    assert barrier["loop_barriers"] > 0
    assert barrier["loop_shared_operations"] > 0
    assert barrier["loop_shuffles"] > 0


def test_spills_and_local_memory_are_found(planted: dict[str, dict[str, Any]]) -> None:
    found = planted["registers:sm_80"]
    assert found["spills"] > 0
    assert found["local_bytes"] > 0


def test_tensor_cores_are_found_where_triton_uses_them(planted: dict[str, dict[str, Any]]) -> None:
    assert planted["product:sm_80"]["tensor_core_instructions"] == 16  # 32 x 32 x 32 in m16n8k16
    assert planted["product:sm_90"]["tensor_core_instructions"] > 0
    assert planted["product:sm_75"]["tensor_core_instructions"] == 0


def test_a_case_that_claims_too_many_units_is_refused(planted: dict[str, dict[str, Any]]) -> None:
    assert "512 or more expected" in planted["wrong:sm_80"]["error"]


_WAITING = """
	.section	.text.k,"ax",@progbits
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_2:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R8], R9 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   FADD R5, R4, R5 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_a_loop_that_only_waits_does_not_hide_the_one_around_it() -> None:
    """As tensor cores are waited for on sm_100: five instructions for the four numbers that the load brings."""
    case = CompileCase("k", None, 1, "", {}, {}, 1, 128, ("bytes", 4.0), 128, 512, 4.0)
    found = triton_compile.count(case, "sm_100", sass.parse(_WAITING)["k"], sass.Resources(32, 0, 0, 0), 0)
    assert (found.issue_slots_per_unit, found.unrolled, found.load_width_bytes) == (5 / 4, 1, 16)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "share"),
    [
        ("sm_80", 32, 0, 8, 1.0),
        ("sm_80", 128, 0, 4, 16 / 64),  # 65,536 registers are 16 warps of 128 x 32
        ("sm_86", 128, 0, 4, 16 / 48),
        ("sm_80", 33, 0, 8, 48 / 64),  # registers come in portions: 33 count as 40
        ("sm_80", 32, 80 << 10, 4, 8 / 64),  # two blocks of 80 KiB and the system's 1 KiB in 164
        ("sm_86", 32, 80 << 10, 4, 4 / 48),
        ("sm_90", 32, 0, 1, 32 / 64),  # at most 32 blocks
        ("sm_75", 32, 65 << 10, 4, 0.0),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, share: float) -> None:
    assert occupancy(target, registers, shared, warps) == pytest.approx(share)


def test_interpreted_kernels_are_not_compiled() -> None:
    """This process runs the interpreter; the error says what to do."""
    case = CompileCase("k", None, 1, "", {}, {}, 1, 1, ("bytes", 1.0), 1, 1, 1.0)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        triton_compile.compile_case(case, "sm_80")


def test_a_loop_that_ptxas_unrolled_whole_is_counted_as_its_turns() -> None:
    """Two turns of four numbers a lane, ten instructions with what is around; a third turn would be missing."""
    load = "        /*0000*/                   LDG.E.128 R4, [R2.64] ;\n"
    rest = "        /*0010*/                   FADD R5, R4, R5 ;\n" * 7 + "        /*0020*/                   EXIT ;\n"
    function = sass.parse('\t.section\t.text.k,"ax",@progbits\n.text.k:\n' + 2 * load + rest)["k"]
    case = CompileCase("k", None, 1, "", {}, {}, 1, 128, ("bytes", 4.0), 256, 1024, 4.0, loop_turns={-1: 256.0})
    found = triton_compile.count(case, "sm_90", function, sass.Resources(32, 0, 0, 0), 0)
    assert (found.issue_slots_per_unit, found.unrolled, found.load_width_bytes) == (10 / 8, 2, 16)
    longer = dataclasses.replace(case, loop_turns={-1: 384.0})
    with pytest.raises(triton_compile.CountError, match="48 or more expected"):
        triton_compile.count(longer, "sm_90", function, sass.Resources(32, 0, 0, 0), 0)
