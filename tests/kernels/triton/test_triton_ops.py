"""What only the `triton` provider has: a kernel by rows and card, adapters by address, merged weights, refusals."""

import pytest
import torch
from torch import Tensor

from support.kernels.providers import CPU

pytest.importorskip("triton")

import triton
from triton.runtime import interpreter

from guanaco.kernels import NativeUnavailable, load_ops, nf4
from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable
from guanaco.kernels.ops import NORMS, PROJECTIONS, LayerWeights
from guanaco.kernels.triton import ops as triton_ops
from guanaco.kernels.triton.layers import rows_of
from guanaco.kernels.triton.ops import TritonOps
from guanaco.kernels.triton.products import nf4_dequant, nf4_dot, nf4_simt
from guanaco.kernels.triton.products.adapter_tables import AdapterTables, half_pair, place_adapter
from guanaco.kernels.triton.products.pack import merge, pack_nf4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair_of(rank: int, *, seed: int = 0, up: float = 1.0) -> LoraPair:
    return LoraPair(randn(rank, 64, seed=seed) * up, randn(32, rank, seed=seed + 1) * up, 0.5)


def delta(pair: LoraPair) -> Tensor:
    return pair.scale * (pair.b.double() @ pair.a.double())


def test_the_kernel_follows_from_rows_and_card() -> None:
    ampere = TritonOps(device=CPU, dtype=torch.bfloat16)
    kernels = {rows: ampere._kernel(rows) for rows in (1, 4, 5, 64, 65, 512)}
    assert kernels == {1: nf4_simt, 4: nf4_simt, 5: nf4_dot, 64: nf4_dot, 65: nf4_dequant, 512: nf4_dequant}
    turing = TritonOps(device=CPU, dtype=torch.float16, capability=(7, 5))
    assert {rows: turing._kernel(rows) for rows in (1, 8, 9)} == {1: nf4_simt, 8: nf4_simt, 9: nf4_dequant}
    with pytest.raises(NativeUnavailable, match=r"7\.5 has no bfloat16: use --dtype float16"):
        TritonOps(device=CPU, dtype=torch.bfloat16, capability=(7, 5))


def test_e4m3_needs_a_card_that_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter needs none; a GPU, which `cuda` stands for here, needs 8.9."""
    assert torch.float8_e4m3fn in TritonOps(device=CPU, dtype=torch.float16, capability=(7, 5)).cache_dtypes
    monkeypatch.setattr(TritonOps, "self_check", lambda self: None)
    monkeypatch.setattr(triton_ops, "AdapterTables", lambda device: None)
    for capability, kinds in {(7, 5): 1, (8, 6): 1, (8, 9): 2, (12, 0): 2}.items():
        ops = TritonOps(device=torch.device("cuda", 0), dtype=torch.float16, capability=capability)
        assert ops.cache_dtypes == (torch.int8, torch.float8_e4m3fn)[:kinds]


def test_half_precision_as_on_a_card_without_bfloat16() -> None:
    """float16 activations, eight rows by the kernel without tensor cores, and a row that float16 does not hold."""
    ops = TritonOps(device=CPU, dtype=torch.float16, capability=(7, 5))
    weight = nf4.quantize(randn(24, 128) * 0.01)
    handle = ops.prepare(weight, None)
    x = randn(8, 128, seed=1)
    x[3] *= 2e4
    assert x[3].abs().max() > 4e4
    y = ops.linear(x.half(), handle, None, 0)
    expected = x.half().double() @ weight.dequantize().double().T
    assert y.dtype == torch.float16
    assert float((y.double() - expected).norm() / expected.norm()) < 2e-3
    for row in range(8):
        assert float((y[row].double() - expected[row]).norm() / expected[row].norm()) < 2e-3


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(NativeUnavailable, match=r"needs an NVIDIA GPU .* use --provider cpu"):
            load_ops("triton", device=CPU, dtype=torch.bfloat16)
    with monkeypatch.context() as patch:
        plain = type("Plain", (), {"create_inline_asm": interpreter.InterpreterBuilder.create_load})
        patch.setattr(interpreter, "InterpreterBuilder", plain)
        plain.__module__ = plain.create_inline_asm.__module__
        with pytest.raises(NativeUnavailable, match="does not know inline PTX"):
            load_ops("triton", device=CPU, dtype=torch.bfloat16)


def test_kernels_that_multiply_wrongly_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs at start on a GPU."""
    ops = TritonOps(device=CPU, dtype=torch.bfloat16)
    ops.self_check()
    product = nf4_dot.product

    def swapped(x: Tensor, *args: object, **kwargs: object) -> None:
        product(x.view(-1, 2).flip(1).view(x.shape).contiguous(), *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(nf4_dot, "product", swapped)
    with pytest.raises(NativeUnavailable, match=r"multiply wrongly here .* with 5 rows"):
        ops.self_check()


@pytest.mark.parametrize("up", [1.0, 1e-6, 1e6], ids=["usual", "tiny", "huge"])
def test_matrices_in_float16_keep_their_digits(up: float) -> None:
    """A power of two goes into the scale: neither tiny nor huge elements are lost, as a plain cast would lose them."""
    pair = pair_of(8, up=up)
    half = half_pair(pair, CPU)
    assert half.a.dtype == half.b.dtype == torch.float16
    assert half.a.abs().max() <= 1
    error = (delta(half) - delta(pair)).norm() / delta(pair).norm()
    assert float(error) < 5e-4
    assert half_pair(half, CPU) is half


def test_an_adapter_is_placed_in_one_piece() -> None:
    pairs = [pair_of(rank, seed=rank) for rank in (3, 8, 5)]
    placed = place_adapter(pairs, CPU, None)
    assert len({matrix.untyped_storage().data_ptr() for pair in placed for matrix in (pair.a, pair.b)}) == 1
    for before, after in zip(pairs, placed, strict=True):
        assert after.a.data_ptr() % 16 == after.b.data_ptr() % 16 == 0
        assert float((delta(after) - delta(before)).norm() / delta(before).norm()) < 5e-4


def test_tables_follow_the_slots_and_stay_where_they_are() -> None:
    tables = AdapterTables(CPU)
    tables.reserve(4, 3)
    places = [tensor.data_ptr() for tensor in (tables.a_ptr, tables.b_ptr, tables.rank, tables.scale)]
    first, second, other = (half_pair(pair_of(rank, seed=rank), CPU) for rank in (8, 4, 16))
    table = LoraTable({(0, 1): first, (3, 1): second})
    assert tables.refresh(table, [1]) == (8, False), "rank 4 is no multiple of 8"
    assert tables.rank.tolist() == [[0, 8, 0], [0] * 3, [0] * 3, [0, 4, 0]]
    assert tables.a_ptr[0, 1] == first.a.data_ptr()
    assert tables.scale[3, 1] == pytest.approx(second.scale)
    table.pairs = {(0, 1): other}
    assert tables.refresh(table, [1]) == (8, False), "nobody said that it had changed"
    table.changes += 1
    assert tables.refresh(table, [1])[0] == 16
    assert tables.rank.tolist() == [[0, 16, 0], *[[0] * 3] * 3]
    table.pairs = {}
    table.changes += 1
    assert tables.refresh(table, [1])[0] == 0
    assert not tables.rank.any()
    assert [t.data_ptr() for t in (tables.a_ptr, tables.b_ptr, tables.rank, tables.scale)] == places


def test_an_operand_adds_up_what_one_row_asks_of_a_slot() -> None:
    tables, table = AdapterTables(CPU), LoraTable({(0, 0): pair_of(8), (0, 2): pair_of(5)})
    batch = LoraBatch.build([((2, 0.5), (0, 1.0)), (), ((2, 0.25), (2, 0.5))], table, CPU)
    operand = tables.operand(batch, 3)
    assert operand is not None
    assert operand.active_slots.tolist() == [0, 2]
    assert operand.factors.tolist() == [[1.0, 0.0, 0.0], [0.5, 0.0, 0.75]]
    assert (operand.max_rank, operand.rows) == (8, 3)
    assert tables.operand(LoraBatch.build([(), ()], table, CPU), 2) is None


def test_merged_weights_are_not_held_twice() -> None:
    ops = TritonOps(device=CPU, dtype=torch.float32)
    shapes = {
        "q": (64, 64),
        "k": (32, 64),
        "v": (32, 64),
        "o": (64, 64),
        "g": (128, 64),
        "u": (128, 64),
        "d": (64, 128),
    }
    weights = [nf4.quantize(randn(n, k, seed=i)) for i, (n, k) in enumerate(shapes.values())]
    handles = tuple(ops.prepare(weight, None) for weight in weights)
    apart = [ops.linear(randn(1, h.in_features, seed=9), h, None, 0) for h in handles]
    layers = ops.fuse(
        [LayerWeights(dict(zip(PROJECTIONS, handles, strict=True)), dict.fromkeys(NORMS, torch.ones(64)))],
        head_dim=16,
        eps=1e-5,
    )
    assert layers is not None
    storages = [handle.weight.words.untyped_storage().data_ptr() for handle in handles]  # type: ignore[union-attr]
    assert [len(set(storages[i:j])) for i, j in ((0, 3), (4, 6))] == [1, 1]
    for handle, before in zip(handles, apart, strict=True):
        # Decoded scales are multiplied and added in two roundings, those decoded on the fly in one.
        after = ops.linear(randn(1, handle.in_features, seed=9), handle, None, 0)
        assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)


def test_parts_of_a_merged_weight_begin_where_they_should() -> None:
    """Double-quantised: 256 groups share a nested scale, and a part's first one is not the merged weight's."""
    parts = [pack_nf4(nf4.quantize(randn(n, 128, seed=n) * n)) for n in (256, 128, 384)]
    whole = merge(parts)
    assert whole.double_quant
    for part, start in zip(parts, (0, 256, 384), strict=True):
        view = rows_of(whole, start, start + part.n)
        assert torch.equal(view.words, part.words)
        assert torch.equal(view.scales(), part.scales())


def test_weights_that_groups_cross_are_not_fused() -> None:
    ops = TritonOps(device=CPU, dtype=torch.float32)
    handle = ops.prepare(nf4.quantize(randn(80, 80)), None)
    layer = LayerWeights(dict.fromkeys(PROJECTIONS, handle), dict.fromkeys(NORMS, torch.ones(80)))
    assert ops.fuse([layer], head_dim=16, eps=1e-5) is None
