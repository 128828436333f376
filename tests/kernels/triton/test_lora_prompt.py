"""LoRA's shrink of prompts in Triton's interpreter against float64, and its machine code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.kernels.lora_cases import NAN, LoraCase, make_lora
from support.kernels.tolerances import relative_l2

pytest.importorskip("triton")

from guanaco.kernels.triton.products import lora as lora_triton
from guanaco.kernels.triton.products import lora_prompt
from guanaco.kernels.triton.products.lora import shrink

pytestmark = pytest.mark.usefixtures("nan_poison")
TOLERANCE = 1e-6  # float32 sums of exact products; measured: 2e-7


def check(case: LoraCase, k: int, parts: int, *, seed: int = 0) -> None:
    """Rows that use an adapter, zeros beyond its rank; everything else stays as it was, which is NaN."""
    lora = case.lora
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(lora.rows, k, generator=generator).half()
    row_factor = torch.exp2(torch.randint(-2, 3, (lora.rows,), generator=generator).float())
    first = len(case.matrices) - parts
    step = shrink(x, row_factor, lora, range(first, first + parts), [0] * parts)
    expected = torch.full(step.t.shape, NAN, dtype=torch.float64)
    values = x.double() * row_factor.double()[:, None]
    for index, slot in enumerate(lora.active_slots.tolist()):
        used = lora.factors[index] != 0
        for part in range(parts):
            if slot in case.matrices[first + part]:
                a, _, scale = case.matrices[first + part][slot]
                t = torch.zeros(lora.rows, lora.max_rank, dtype=torch.float64)
                t[:, : a.shape[0]] = values @ a.double().T * scale * lora.factors[index].double()[:, None]
                expected[index, part, used] = t[used]
    written = ~expected.isnan()
    assert torch.equal(~step.t.isnan(), written)
    assert relative_l2(step.t[written], expected[written]) < TOLERANCE


@pytest.mark.parametrize(("rows", "k"), [(65, 192), (100, 64), (130, 100)])
@pytest.mark.parametrize("aligned", [False, True])
def test_odd_shapes(rows: int, k: int, aligned: bool) -> None:
    """Blocks of rows, of k and of ranks that are not full; k that is no multiple of 64."""
    ranks = [8, 40, 72] if aligned else [4, 33, 72]
    check(make_lora(rows, k, [8, 8], ranks, padding=1, aligned=aligned), k, 2)


def test_blocks_of_rows_that_use_nothing() -> None:
    row_slots = [[0]] * 30 + [[]] * 100 + [[1], [0, 1]] * 10
    check(make_lora(150, 128, [8, 8, 8], [16, 5], row_slots=row_slots, missing={(4, 1)}, first_module=3), 128, 3)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_mix(data: st.DataObject) -> None:
    rows = data.draw(st.integers(65, 140))
    ranks = data.draw(st.lists(st.integers(1, 130), min_size=1, max_size=4))
    row_slots = [data.draw(st.sampled_from([[], [0], [len(ranks) - 1]])) for _ in range(rows)]
    k = 64 * data.draw(st.integers(1, 3))
    check(make_lora(rows, k, [8], ranks, row_slots=row_slots), k, 1)


def test_the_other_kernel_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel a batch gets depends on its rows alone; both are held to the same answer."""
    case = make_lora(66, 128, [8], [16, 5])
    launched = []
    plain = lora_prompt.shrink_prompt
    monkeypatch.setattr(lora_triton, "shrink_prompt", lambda *a: launched.append(a) or plain(*a))
    check(case, 128, 1)
    assert len(launched) == 1
    monkeypatch.setattr(lora_triton, "PROMPT_ROWS", 1000)
    check(case, 128, 1)
    assert len(launched) == 1
