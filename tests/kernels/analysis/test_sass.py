"""Reading machine code: loops, branches of diverged warps, and widths of loads, on listings written for the purpose."""

import pytest

from guanaco.kernels.analysis import sass

_LOOP = """
	.section	.text.two_loops,"ax",@progbits
.text.two_loops:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/                   LDG.E.U8 R8, [R2.64+0x10] ;
        /*0040*/                   BRA.DIV ~URZ, `(.L_x_9) ;
        /*0050*/                   SHFL.IDX PT, R4, R30, 0x10, 0x1f ;
.L_x_2:
        /*0060*/                   HFMA2 R5, R4, R4, R5 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
        /*0080*/               @P2 BRA `(.L_x_8) ;
.L_x_3:
        /*0090*/                   IADD3 R2, R2, 0x10, RZ ;
        /*00a0*/               @P6 CALL.REL.NOINC `(.L_x_4) ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00c0*/                   STG.E [R2.64], R5 ;
        /*00d0*/                   EXIT ;
.L_x_8:
        /*00e0*/                   MOV R20, 0x0 ;
        /*00f0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_ftz_f32_slowpath) ;
        /*0100*/                   BRA `(.L_x_3) ;
.L_x_9:
        /*0110*/                   WARPSYNC R0 ;
        /*0120*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*0130*/                   BRA `(.L_x_7);
        /*0140*/                   NOP;
"""


@pytest.fixture
def function() -> sass.Function:
    return sass.parse(_LOOP)["two_loops"]


def test_loops_of_a_converged_warp(function: sass.Function) -> None:
    """The outer loop without its slow path, its diverged path and the trap behind the end; and the inner one."""
    outer, inner = function.loops
    assert [i.opcode for i in outer.instructions] == [
        "LDG.E.128.CONSTANT",
        "LDG.E.U8",
        "BRA.DIV",
        "SHFL.IDX",
        "HFMA2",
        "BRA",
        "BRA",
        "IADD3",
        "CALL.REL.NOINC",
        "BRA",
    ]
    assert (outer.innermost, inner.innermost) == (False, True)
    assert [i.opcode for i in inner.instructions] == ["HFMA2", "BRA"]
    assert all("WARPSYNC" not in i.opcode and i.opcode != "NOP" for i in function.instructions)


def test_instructions_of_the_whole_kernel(function: sass.Function) -> None:
    assert len(function.instructions) == 14
    # 4 outside, 8 in the outer loop alone, 2 in the inner one
    assert function.executed({}) == 14
    assert function.executed({0: 10}) == 4 + 10 * 10
    assert function.executed({0: 10, 1: 3}) == 4 + 10 * (8 + 3 * 2)


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E.128.CONSTANT", 16),
        ("LDG.E.64", 8),
        ("LDG.E", 4),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.S8", 1),
        ("LDG.E.ENL2.256", 32),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDS.128", 0),
        ("STG.E.128", 0),
    ],
)
def test_bytes_of_a_load(opcode: str, size: int) -> None:
    assert sass.Instruction(opcode, "", predicated=False).global_load_bytes == size


def test_the_width_that_is_claimed_is_the_least_possible() -> None:
    """16 bytes in four narrow loads and 64 in wide ones: 16 bytes may all have come narrow, 17 can't have."""
    code = [sass.Instruction("LDG.E", "", predicated=False)] * 4
    code += [sass.Instruction("LDG.E.128", "", predicated=False)] * 4
    assert sass.load_width(code, 16) == 4
    assert sass.load_width(code, 17) == 16
    assert sass.load_width(code, 64) == 16, "the wide ones bring just that"
    assert sass.load_width(code, 81) == 0


@pytest.mark.parametrize(
    ("opcode", "counts"),
    [("HMMA.16816.F32", 1), ("HGMMA.64x8x16.F32", 1), ("IMMA.16832.S8.S8", 1), ("QMMA.16832.F32", 1),
     ("UTCHMMA", 1), ("FFMA", 0), ("IMAD.WIDE", 0), ("HFMA2.MMA", 0)],
)  # fmt: skip
def test_tensor_core_instructions(opcode: str, counts: int) -> None:
    assert sass.count_tensor_core([sass.Instruction(opcode, "", predicated=False)]) == counts


def test_a_branch_on_an_operand_may_fall_through() -> None:
    listing = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   UMOV UR4, URZ ;
.L_x_0:
        /*0010*/                   UIADD3 UR4, UPT, UPT, UR4, 0x1, URZ ;
        /*0020*/                   BRA.U UP0, `(.L_x_0) ;
        /*0030*/                   EXIT ;
"""
    function = sass.parse(listing)["k"]
    assert len(function.instructions) == 4
    assert [len(loop.instructions) for loop in function.loops] == [2]


def test_a_converged_warp_jumps_past_what_handles_the_others() -> None:
    """As ptxas writes a maximum over a warp (REDUX) for sm_80."""
    listing = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   BRA.CONV ~URZ, `(.L_x_1) ;
        /*0010*/                   MOV R6, 0x0 ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm70_warpsync) ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   REDUX.MAX.S32 UR4, R16 ;
        /*0050*/                   IMAD.U32 R8, RZ, RZ, UR4 ;
.L_x_2:
        /*0060*/                   STG.E [R2.64], R8 ;
        /*0070*/                   EXIT ;
"""
    function = sass.parse(listing)["k"]
    assert [i.name for i in function.instructions] == ["BRA", "REDUX", "IMAD", "STG", "EXIT"]
