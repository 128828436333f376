"""The loss of the head in parts: the loss and the gradient of torch, in memory that is used again."""

import pytest
import torch
from torch.nn import functional as F

from guanaco.kernels import nf4
from guanaco.server.training.quantized import HeadLoss, ServedLinear
from guanaco.server.training.quantized import head_loss as room
from guanaco.server.training.quantized.linear import Decoder
from support.kernels.providers import FAST, provider_ops

VOCABULARY, HIDDEN, TOKENS = 130, 64, 23


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("max_logits", [1, 7 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_loss_and_its_gradient_are_torchs(
    name: str, max_logits: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_ROWS_IN_CACHE", 3 * VOCABULARY)
    ops = provider_ops(name)
    bias = randn(VOCABULARY, seed=1) if has_bias else None
    weight = ops.prepare(nf4.quantize(randn(VOCABULARY, HIDDEN, seed=2)), None)
    head = ServedLinear(weight, bias, Decoder(ops, 5000), torch.float32)
    hidden, labels = randn(TOKENS, HIDDEN, seed=3) * 3, torch.arange(TOKENS) * 5 % VOCABULARY
    loss_of = HeadLoss(max_logits)
    x, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    logits = exact @ head.decoded().double().T + (0 if bias is None else bias.double())
    expected = F.cross_entropy(logits, labels, reduction="sum") / 7
    expected.backward()
    assert exact.grad is not None
    for _ in range(2):  # the second time in the same memory
        x.grad = None
        loss = loss_of(x, labels, head) / 7
        loss.backward()
        assert x.grad is not None
        assert loss.dtype == torch.float32
        assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
        assert (x.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()


def test_logits_far_apart_stay_finite() -> None:
    logits = torch.tensor([[-1e4, 1e4, 0.0], [3e38, 0.0, 0.0]])
    loss = room._to_gradient(logits, torch.tensor([0, 0]), keeps=True)
    assert loss.item() == pytest.approx(2e4)
    assert torch.equal(logits, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_bfloat16_and_no_gradient() -> None:
    ops = provider_ops("cpu")
    head = ServedLinear(
        ops.prepare(nf4.quantize(randn(VOCABULARY, HIDDEN, seed=2)), None), None, Decoder(ops), torch.bfloat16
    )
    x = randn(TOKENS, HIDDEN, seed=3).bfloat16().requires_grad_()
    labels = torch.arange(TOKENS)
    loss = HeadLoss()(x, labels, head)
    loss.backward()
    expected = F.cross_entropy(x.detach().float() @ head.decoded().T, labels, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    with torch.no_grad():
        assert HeadLoss()(x, labels, head).item() == loss.item()
    empty = HeadLoss()(x[:0], labels[:0], head)
    assert empty.item() == 0.0


def test_all_parts_use_the_same_memory() -> None:
    loss = HeadLoss()
    assert loss.logits(4, 8).data_ptr() == loss.logits(2, 5).data_ptr()
