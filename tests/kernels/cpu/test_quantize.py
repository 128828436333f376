"""The native quantiser against `kernels.nf4.quantize`, which the format's own tests compare with bitsandbytes."""

from unittest import mock

import pytest
import torch

from guanaco.kernels import nf4
from guanaco.kernels.cpu import quantize as native
from guanaco.kernels.cpu.library import Context, available_isas
from guanaco.kernels.nf4 import Nf4Weight
from support.kernels.nf4_matrices import KINDS, make_matrix

ISAS = available_isas()
FIELDS = ("packed", "absmax", "nested_absmax", "nested_map")
# One group, several tasks of 1,024 groups, a short last group, an odd number of values, rows that share a group.
SHAPES = ((1, 64), (70, 1024), (3, 50), (7, 129), (513, 200))


def assert_same(ours: Nf4Weight, theirs: Nf4Weight) -> None:
    for field in FIELDS:
        a, b = getattr(ours, field), getattr(theirs, field)
        assert (a is None and b is None) or torch.equal(a, b), field
    assert (ours.shape, ours.source_dtype, ours.nested_offset) == (
        theirs.shape,
        theirs.source_dtype,
        theirs.nested_offset,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_gives_the_same_bits(isa: str, kind: str) -> None:
    context = Context(isa, 2)
    with mock.patch.object(native, "_context", return_value=context):
        for seed, shape in enumerate(SHAPES):
            for dtype in nf4.SOURCE_DTYPES:
                x = make_matrix(kind, *shape, dtype, seed)
                if not torch.isfinite(x).all():
                    continue  # float16 has no such values
                double_quant = seed % 2 == 0
                assert_same(native.quantize(x, double_quant=double_quant), nf4.quantize(x, double_quant=double_quant))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 63, 64 * 1024 + 5, -1])
def test_a_value_that_is_not_finite_is_refused(isa: str, bad: float, place: int) -> None:
    x = torch.ones(130, 1025)
    x.view(-1)[place] = bad
    context = Context(isa, 2)
    with mock.patch.object(native, "_context", return_value=context), pytest.raises(ValueError, match="not finite"):
        native.quantize(x)


def test_a_transposed_matrix_is_read_in_its_own_order() -> None:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).t()
    assert_same(native.quantize(x), nf4.quantize(x.contiguous()))


def test_without_a_native_library_the_other_quantiser_does_it() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    with mock.patch.object(native, "_context", return_value=None), mock.patch.object(nf4, "quantize") as called:
        native.quantize(x, double_quant=False)
    called.assert_called_once_with(x, double_quant=False)


@pytest.mark.parametrize("x", [torch.ones(64), torch.ones(0, 64), torch.ones(2, 64, dtype=torch.float64)])
def test_other_shapes_and_dtypes_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="NF4 needs"):
        native.quantize(x)
