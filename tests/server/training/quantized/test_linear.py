"""The layers alone: pieces of a weight, inputs of any shape, no weight to train or save, and memory that is shared."""

import pytest
import torch

from guanaco.kernels import nf4
from guanaco.server.training.quantized.linear import Decoder, ServedEmbedding, ServedLinear
from support.kernels.providers import FAST, provider_ops


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("n", "k"), [(1, 64), (50, 128), (33, 80), (130, 192)])
@pytest.mark.parametrize("max_weights", [1, 5000, 1 << 24])
def test_a_product_in_pieces_is_the_product(name: str, n: int, k: int, max_weights: int) -> None:
    ops = provider_ops(name)
    bias = randn(n, seed=1)
    layer = ServedLinear(ops.prepare(nf4.quantize(randn(n, k)), None), bias, Decoder(ops, max_weights), torch.float32)
    weight = layer.decoded().double()
    x = randn(2, 3, k, seed=2).requires_grad_()
    y = layer(x)
    dy = randn(*y.shape, seed=3)
    y.backward(dy)
    assert torch.allclose(y.double(), x.double() @ weight.T + bias.double(), rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), dy.double() @ weight, rtol=1e-5, atol=1e-5)


def test_pieces_are_whole_tiles_and_cover_the_weight() -> None:
    ops = provider_ops("cpu")
    handle = ops.prepare(nf4.quantize(randn(130, 64)), None)
    assert Decoder(ops, 1).pieces(handle)[:2] == [(0, 16), (16, 32)]
    assert Decoder(ops, 64 * 100).pieces(handle) == [(0, 80), (80, 130)]
    assert Decoder(ops).pieces(handle) == [(0, 130)]


def test_all_layers_decode_into_the_same_memory() -> None:
    ops = provider_ops("cpu")
    decoder = Decoder(ops)
    large, small = (ops.prepare(nf4.quantize(randn(n, 64)), None) for n in (64, 32))
    first = decoder.rows(large, 0, 64, torch.float32)
    assert decoder.rows(small, 0, 32, torch.float32).data_ptr() == first.data_ptr()


def test_an_input_without_a_gradient_gets_none() -> None:
    ops = provider_ops("cpu")
    layer = ServedLinear(ops.prepare(nf4.quantize(randn(8, 64)), None), None, Decoder(ops), torch.float32)
    assert not layer(randn(2, 64)).requires_grad
    assert list(layer.parameters()) == []
    assert layer.state_dict() == {}


def test_no_tokens_at_all() -> None:
    ops = provider_ops("cpu")
    layer = ServedLinear(ops.prepare(nf4.quantize(randn(8, 64)), None), None, Decoder(ops), torch.float32)
    x = torch.empty(0, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 64)


def test_an_embedding_keeps_its_table_and_gives_the_dtype_of_training() -> None:
    table = randn(10, 4).bfloat16()
    embedding = ServedEmbedding(table, torch.float32, None)
    assert embedding.weight.data_ptr() == table.data_ptr()
    assert not embedding.weight.requires_grad
    out = embedding(torch.tensor([[3, 9]]))
    assert out.dtype == torch.float32
    assert torch.equal(out[0], table[[3, 9]].float())
