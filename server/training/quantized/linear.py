"""Linear layers over the weights as they are served, with a gradient for their input; the weights are frozen.

A decoded weight is never in memory as a whole: some rows are decoded into a buffer that all layers share, and torch
multiplies with them. Knows the kernels' handles, no models or files. Built by `model`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guanaco.kernels import DecodesRows, LinearHandle

# Weights that are decoded at a time (32 MiB of float32). A matrix of a 1B model is one product or two, and the head of
# a large vocabulary several.
MAX_DECODED_WEIGHTS = 8 << 20
# Rows that lie together in a packed weight. Pieces start at a multiple of it.
_TILE_ROWS = 16


class Decoder:
    """Decodes pieces of weights into memory that is used again for the next piece.

    One thread at a time: a piece is only valid until the next one is decoded.
    """

    def __init__(self, ops: DecodesRows, max_weights: int = MAX_DECODED_WEIGHTS) -> None:
        self._ops = ops
        self._max_weights = max_weights
        self._memory = torch.empty(0, dtype=torch.float32)

    def pieces(self, weight: LinearHandle) -> list[tuple[int, int]]:
        """(first row, row after the last) of each piece, in order: as few as the memory allows, of nearly one size."""
        rows, columns = weight.out_features, weight.in_features
        most = max(_TILE_ROWS, self._max_weights // columns // _TILE_ROWS * _TILE_ROWS)
        count = -(-rows // most)
        step = -(-rows // count // _TILE_ROWS) * _TILE_ROWS
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def rows(self, weight: LinearHandle, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start … stop − 1 of the weight, [stop − start, in] in `dtype` (float32 or bfloat16)."""
        shape = (stop - start, weight.in_features)
        if self._memory.dtype != dtype or self._memory.numel() < shape[0] * shape[1]:
            self._memory = torch.empty(shape[0] * shape[1], dtype=dtype)
        out = self._memory[: shape[0] * shape[1]].view(shape)
        self._ops.decode_rows(weight, start, stop, out)
        return out

    def product_into(self, y: Tensor, x: Tensor, weight: LinearHandle) -> None:
        """y [t, out] = x · Wᵀ of x [t, in], computed in the dtype of x. y has that dtype, or float32."""
        for start, stop in self.pieces(weight):
            piece = self.rows(weight, start, stop, x.dtype).t()
            if y.dtype == x.dtype:
                torch.mm(x, piece, out=y[:, start:stop])
            else:
                y[:, start:stop] = torch.mm(x, piece)

    def gradient_into(self, dx: Tensor, dy: Tensor, weight: LinearHandle) -> None:
        """dx [t, in] = dy · W of dy [t, out], both of one dtype."""
        for start, stop in self.pieces(weight):
            # beta 0 ignores what `dx` holds, NaN too.
            dx.addmm_(dy[:, start:stop], self.rows(weight, start, stop, dy.dtype), beta=1 if start else 0)


class _Product(torch.autograd.Function):
    """x · Wᵀ + bias of rows x [t, in]. Its gradient needs the weight alone: nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: LinearHandle, bias: Tensor | None, decoder: Decoder) -> Tensor:
        ctx.weight, ctx.decoder = weight, decoder
        y = torch.empty((x.shape[0], weight.out_features), dtype=x.dtype)
        decoder.product_into(y, x, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        dy = gradients[0]
        dx = torch.empty((dy.shape[0], ctx.weight.in_features), dtype=dy.dtype)
        ctx.decoder.gradient_into(dx, dy, ctx.weight)
        return dx, None, None, None


class ServedLinear(nn.Linear):
    """A frozen linear layer over a served weight. PEFT wraps it as it wraps any `nn.Linear`.

    `weight` is an empty tensor that tells PEFT device and dtype. There is no tensor of the weight itself, so nothing
    can train, merge or save it.
    """

    def __init__(self, weight: LinearHandle, bias: Tensor | None, decoder: Decoder, dtype: torch.dtype) -> None:
        """bias: [out]; it is kept in `dtype`, the dtype in which PEFT adds its matrices."""
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.compute_dtype = dtype
        self.weight = torch.empty(0, dtype=dtype)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False))
        self._served, self._decoder = weight, decoder

    def forward(self, input: Tensor) -> Tensor:
        """x · Wᵀ + bias of x [..., in], in the dtype of x (float32 or bfloat16)."""
        x = input.reshape(-1, self.in_features)
        y: Tensor = _Product.apply(x, self._served, self.bias, self._decoder)  # type: ignore[no-untyped-call]
        return y.view(*input.shape[:-1], self.out_features)

    def product_into(self, y: Tensor, x: Tensor) -> None:
        """y [t, out] = x · Wᵀ + bias of x [t, in], without a gradient. y has the dtype of x, or float32."""
        self._decoder.product_into(y, x, self._served)
        if self.bias is not None:
            y.add_(self.bias)

    def gradient_into(self, dx: Tensor, dy: Tensor) -> None:
        """dx [t, in] = dy · W, both of one dtype."""
        self._decoder.gradient_into(dx, dy, self._served)

    def decoded(self) -> Tensor:
        """float32 [out, in]: a copy of the decoded weight. For tests."""
        pieces = self._decoder.pieces(self._served)
        return torch.cat([self._decoder.rows(self._served, *piece, torch.float32).clone() for piece in pieces])


class ServedEmbedding(nn.Embedding):
    """A frozen embedding that stays in its stored dtype; its outputs have the dtype of training."""

    def __init__(self, table: Tensor, dtype: torch.dtype, padding_idx: int | None) -> None:
        """table: [vocab, hidden]; it is not copied."""
        super().__init__(table.shape[0], table.shape[1], padding_idx=padding_idx, _weight=table, _freeze=True)
        self.compute_dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        """[..., hidden] of token ids."""
        return F.embedding(input, self.weight).to(self.compute_dtype)
