"""The proof that a variant of `nf4_dot` groups what pack=2 takes as it must, on PTX with planted mistakes.

That every variant passes it is in test_machine_code.py.
"""

import pytest

pytest.importorskip("triton")

from guanaco.kernels.triton.products import nf4_dot
from guanaco.kernels.triton.products.pack_proof import ungrouped

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
