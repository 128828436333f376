"""The loss of the head, computed with its gradient for some tokens at a time, so that memory never holds all logits.

The logits of some tokens are computed into a buffer that is used again. From them come the loss and, in the same
buffer, the gradient of the logits; the head's weight turns it into that of the hidden states. Knows the layers of
`linear`. Called by the training loop.
"""

from typing import Any

import torch
from torch import Tensor

from guanaco.server.training.quantized.linear import ServedLinear

_MAX_LOGITS = 32 << 20  # in memory at a time (128 MiB of float32); the head is decoded twice for so many
_ROWS_IN_CACHE = 1 << 18  # logits (1 MiB) for which all operations are done before the next ones, so caches hold them


class HeadLoss:
    """Computes the loss with one buffer for logits. Not for several threads at a time."""

    def __init__(self, max_logits: int = _MAX_LOGITS) -> None:
        self._max_logits = max_logits
        self._memory = torch.empty(0)

    def __call__(self, hidden: Tensor, labels: Tensor, head: ServedLinear) -> Tensor:
        """The sum of the cross-entropies of hidden states [t, in] with labels int64 [t], a float32 scalar.

        Gradients flow to the hidden states only; the head is frozen."""
        loss: Tensor = _Loss.apply(hidden, labels, head, self)  # type: ignore[no-untyped-call]
        return loss

    def logits(self, rows: int, columns: int) -> Tensor:
        """The buffer for logits, float32 [rows, columns], with arbitrary content."""
        if self._memory.numel() < rows * columns:
            self._memory = torch.empty(rows * columns)
        return self._memory[: rows * columns].view(rows, columns)

    def rows(self, vocabulary: int) -> int:
        """How many tokens have their logits in memory at a time."""
        return max(1, self._max_logits // vocabulary)


class _Loss(torch.autograd.Function):
    """Computes the gradient together with the loss, because the logits are only there then."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: ServedLinear, memory: HeadLoss) -> Tensor:
        dx = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total, step = torch.zeros((), dtype=torch.float64), memory.rows(head.out_features)
        for start in range(0, len(hidden), step):
            x, wanted = hidden[start : start + step], labels[start : start + step]
            logits = memory.logits(len(x), head.out_features)
            head.product_into(logits, x)
            total += _to_gradient(logits, wanted, keeps=dx is not None)
            if dx is not None:
                head.gradient_into(dx[start : start + step], logits.to(hidden.dtype))
        ctx.dx = dx
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        dx, ctx.dx = ctx.dx, None
        return (None if dx is None else dx.mul_(gradients[0].to(dx.dtype))), None, None, None


def _to_gradient(logits: Tensor, labels: Tensor, *, keeps: bool) -> Tensor:
    """The summed loss of logits [t, vocabulary], float64. keeps: overwrite the logits with their gradient."""
    total = torch.zeros((), dtype=torch.float64)
    step = max(1, _ROWS_IN_CACHE // logits.shape[1])
    for start in range(0, len(logits), step):
        some, wanted = logits[start : start + step], labels[start : start + step, None]
        chosen = some.gather(1, wanted)
        largest = some.amax(1, keepdim=True)
        sums = some.sub_(largest).exp_().sum(1, keepdim=True)
        total += (sums.log() + largest - chosen).sum(dtype=torch.float64)
        if keeps:
            some.div_(sums)
            some.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
    return total
