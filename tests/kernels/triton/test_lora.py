"""LoRA's shrink and expand in Triton's interpreter against float64, in NaN-filled memory, at odd ranks and rows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.kernels.lora_cases import NAN, LoraCase, make_lora
from support.kernels.tolerances import relative_l2

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from guanaco.kernels.triton.products.lora import LoraStep, lora_expand, rank_bucket, shrink  # noqa: E402

pytestmark = pytest.mark.usefixtures("nan_poison")
# Products and sums in float32; measured: 2e-7.
TOLERANCE = 1e-6


def _x(rows: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float16 [rows, k], and powers of two as row factors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator).half()
    return x, torch.exp2(torch.randint(-2, 3, (rows,), generator=generator).float())


def _expected_t(case: LoraCase, x: Tensor, row_factor: Tensor, modules: list[int]) -> Tensor:
    """float64, NaN where nothing has to be written."""
    lora = case.lora
    t = torch.full((lora.max_active, len(modules), lora.rows, lora.max_rank), NAN, dtype=torch.float64)
    values = x.double() * row_factor.double()[:, None]
    for index, slot in enumerate(lora.active_slots.tolist()):
        for part, module in enumerate(modules):
            if slot in case.matrices[module]:
                a, _, scale = case.matrices[module][slot]
                for row in lora.factors[index].nonzero().view(-1).tolist():
                    t[index, part, row] = 0.0
                    t[index, part, row, : a.shape[0]] = values[row] @ a.double().T * scale * lora.factors[index, row]
    return t


def _check_shrink(case: LoraCase, rows: int, k: int, modules: list[int]) -> LoraStep:
    x, row_factor = _x(rows, k)
    step = shrink(x, row_factor, case.lora, modules, [0] * len(modules))
    expected = _expected_t(case, x, row_factor, modules)
    written = ~expected.isnan()
    assert torch.equal(~step.t.isnan(), written)
    assert relative_l2(step.t[written], expected[written]) < TOLERANCE
    return step


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 9])
def test_shrink_at_odd_rows(rows: int, aligned: bool) -> None:
    """Three parts, three adapters and an empty place; matrices at multiples of 16 bytes, and elsewhere."""
    case = make_lora(rows, 448, [8, 8, 8], [4, 16, 5], padding=1, aligned=aligned)
    _check_shrink(case, rows, 448, [0, 1, 2])


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_shrink_of_long_rows(rows: int) -> None:
    """Turns of 1,024 columns and one that is not whole."""
    _check_shrink(make_lora(rows, 2112, [8], [7]), rows, 2112, [0])


@pytest.mark.parametrize("rank", [4, 8, 16, 24, 64, 100, 128])
def test_shrink_at_every_rank(rank: int) -> None:
    _check_shrink(make_lora(3, 192, [8], [rank, 7]), 3, 192, [0])


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_shrink_of_any_mix(data: st.DataObject) -> None:
    """One to eight adapters of any rank; rows with none, one or several of them; adapters that leave a module alone."""
    rows = data.draw(st.integers(1, 12))
    ranks = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    row_slots = data.draw(
        st.lists(
            st.lists(st.integers(0, len(ranks) - 1), max_size=3, unique=True), min_size=rows, max_size=rows
        )
    )  # fmt: skip
    missing = data.draw(st.sets(st.tuples(st.integers(2, 3), st.integers(0, len(ranks) - 1))))
    k = 64 * data.draw(st.integers(1, 20))
    case = make_lora(
        rows, k, [4, 4], ranks, row_slots=row_slots, missing=missing, padding=data.draw(st.integers(0, 2)),
        first_module=2,
    )  # fmt: skip
    _check_shrink(case, rows, k, [2, 3])


def test_no_adapter_reads_nothing() -> None:
    """A batch whose slots are all empty, as a captured graph may replay it: the tables' contents don't matter."""
    case = make_lora(4, 128, [8], [4, 8])
    case.lora.active_slots.fill_(-1)
    case.lora.a_ptr.fill_(1)
    x, row_factor = _x(4, 128)
    assert shrink(x, row_factor, case.lora, [0], [0]).t.isnan().all()


def test_an_empty_batch() -> None:
    case = make_lora(0, 128, [8], [4])
    assert shrink(torch.empty(0, 128, dtype=torch.float16), torch.empty(0), case.lora, [0], [0]).t.numel() == 0


# ---- expand


@pytest.fixture(autouse=True)
def _tensor_cores_cut_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 see 10 bits behind the point, as on tensor cores: the interpreter would take all 23."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def cut(handle: TensorHandle) -> TensorHandle:
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar == tl.float32
        return plain(self, cut(a), cut(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@triton.jit
def _epilogue(
    y, out_part, t, b_table, rank_table, active, factors, module, rows, n,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, MAX_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr,
    DOT: tl.constexpr, OUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [rows, n] += the deltas of all parts; out_part int32 [n]: each output's part, whose first output is 0."""
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    columns = tl.arange(0, ROWS)
    place = y + columns[None, :] * n + outs[:, None]
    mask = (outs < n)[:, None] & (columns < rows)[None, :]
    acc = tl.load(place, mask=mask, other=0.0)
    mine = tl.load(out_part + outs, mask=outs < n, other=-1)
    for part in tl.static_range(PARTS):
        acc = lora_expand(
            acc, outs % (n // PARTS), mine == part, columns, module + part, part, rows, t, b_table, rank_table, active,
            factors, SLOTS, PARTS, RANK, MAX_ACTIVE, ALIGNED, DOT,
        )  # fmt: skip
    tl.store(place, acc, mask=mask)


def _expand(y: Tensor, step: LoraStep, *, dot: bool) -> None:
    rows, n = y.shape
    lora = step.lora
    out_part = torch.arange(n, dtype=torch.int32) // (n // step.parts)
    outs, row_block = (32, max(8, triton.next_power_of_2(rows))) if dot else (8, triton.next_power_of_2(rows))
    _epilogue[(-(-n // outs),)](
        y, out_part, step.t, lora.b_ptr, lora.rank, lora.active_slots, lora.factors, step.modules[0], rows, n,
        SLOTS=lora.num_slots, PARTS=step.parts, RANK=lora.max_rank, MAX_ACTIVE=lora.max_active, ALIGNED=lora.aligned,
        DOT=dot, OUTS=outs, ROWS=row_block,
    )  # fmt: skip


def _check_expand(case: LoraCase, rows: int, k: int, outs: list[int], *, dot: bool) -> None:
    first = len(case.matrices) - len(outs)
    modules = list(range(first, len(case.matrices)))
    x, row_factor = _x(rows, k)
    step = shrink(x, row_factor, case.lora, modules, [outs[0] * i for i in range(len(outs))])
    y = torch.randn(rows, sum(outs), generator=torch.Generator().manual_seed(5))
    base = y.clone()
    _expand(y, step, dot=dot)
    values = x.double() * row_factor.double()[:, None]
    delta = torch.cat([case.delta(values, m) if case.matrices[m] else torch.zeros(rows, o, dtype=torch.float64)
                       for m, o in zip(modules, outs, strict=True)], 1)  # fmt: skip
    assert relative_l2(y, base.double() + delta) < TOLERANCE
    unused = (case.lora.factors == 0).all(0)
    assert torch.equal(y[unused], base[unused]), "a row without an adapter has other bits"


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_expand_of_one_part(rows: int, dot: bool) -> None:
    _check_expand(make_lora(rows, 64, [37], [4, 40, 9], padding=1), rows, 64, [37], dot=dot)


@pytest.mark.parametrize("dot", [False, True])
def test_expand_with_aligned_matrices(dot: bool) -> None:
    case = make_lora(7, 64, [16, 16], [8, 40], aligned=True, first_module=3, missing={(4, 1)})
    _check_expand(case, 7, 64, [16, 16], dot=dot)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_expand_of_any_mix(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 8))
    ranks = data.draw(st.lists(st.sampled_from([1, 4, 7, 16, 33]), min_size=1, max_size=8))
    row_slots = data.draw(
        st.lists(
            st.lists(st.integers(0, len(ranks) - 1), max_size=2, unique=True), min_size=rows, max_size=rows
        )
    )  # fmt: skip
    missing = data.draw(st.sets(st.tuples(st.integers(0, 1), st.integers(0, len(ranks) - 1)), max_size=3))
    outs = [data.draw(st.sampled_from([8, 24]))] * 2
    case = make_lora(rows, 64, outs, ranks, row_slots=row_slots, missing=missing)
    _check_expand(case, rows, 64, outs, dot=data.draw(st.booleans()))


@pytest.mark.parametrize("dot", [False, True])
def test_a_swapped_slot_is_found(dot: bool) -> None:
    """Planted: two adapters' B exchanged."""
    case = make_lora(4, 64, [16], [8, 8])
    swapped = case.lora.b_ptr.clone()
    swapped[:, [1, 3]] = swapped[:, [3, 1]]
    case.lora = replace(case.lora, b_ptr=swapped)
    with pytest.raises(AssertionError, match="<"):
        _check_expand(case, 4, 64, [16], dot=dot)


def test_buckets() -> None:
    assert [rank_bucket(r) for r in (0, 4, 8, 9, 16, 33, 64, 65, 129)] == [8, 8, 8, 16, 16, 64, 64, 128, 256]
    with pytest.raises(AssertionError):
        rank_bucket(257)
