"""Products of NF4 weights with everything that their kernels can add to them, and the float64 answers.

The same for every kernel of the Triton provider that multiplies: only the function under test differs. Inputs are
exact, so what is left is the kernel's own error.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from guanaco.kernels import nf4
from guanaco.kernels.nf4 import Nf4Weight
from guanaco.kernels.triton.products.lora import LoraStep, shrink
from guanaco.kernels.triton.products.pack import TritonNf4, merge, pack_nf4
from support.kernels.lora_cases import LoraCase, make_lora
from support.kernels.tolerances import relative_l2


class Product(Protocol):
    """What is tested: nf4_simt.product, nf4_dot.product or nf4_dequant.product."""

    def __call__(
        self,
        x: Tensor,
        row_factor: Tensor,
        weight: TritonNf4,
        y: Tensor,
        *,
        bias: Tensor | None,
        lora: LoraStep | None,
        epilogue: str,
        residual: Tensor | None,
    ) -> None: ...


@dataclass
class ProductCase:
    """One call's operands. x is float16, its rows times `row_factor` are the activations."""

    x: Tensor
    row_factor: Tensor
    weights: list[Nf4Weight]
    packed: TritonNf4
    bias: Tensor | None = None
    adapters: LoraCase | None = None
    step: LoraStep | None = None
    epilogue: str = "none"
    residual: Tensor | None = None

    def expected(self) -> Tensor:
        """float64 [rows, n], or [rows, n / 2] for silu_mul."""
        x = self.x.double() * self.row_factor.double()[:, None]
        y = x @ torch.cat([w.dequantize() for w in self.weights]).double().T
        if self.bias is not None:
            y += self.bias.double()
        if self.step is not None:
            assert self.adapters is not None
            y += torch.cat([self.adapters.delta(x, module) for module in self.step.modules], dim=1)
        if self.residual is not None:
            y += self.residual.double()
        if self.epilogue == "silu_mul":
            gate, up = y.chunk(2, dim=1)
            y = gate * torch.sigmoid(gate) * up
        return y

    def run(self, product: Product, dtype: torch.dtype = torch.float32) -> Tensor:
        width = self.packed.n // 2 if self.epilogue == "silu_mul" else self.packed.n
        y = torch.empty(self.x.shape[0], width, dtype=dtype)
        residual = None if self.residual is None else self.residual.to(dtype)
        product(
            self.x, self.row_factor, self.packed, y, bias=self.bias, lora=self.step, epilogue=self.epilogue,
            residual=residual,
        )  # fmt: skip
        return y

    def error(self, product: Product, dtype: torch.dtype = torch.float32) -> float:
        """Relative l2 distance from the float64 answer; NaN if anything was left unwritten."""
        return relative_l2(self.run(product, dtype), self.expected())


def make_weight(n: int, k: int, *, double_quant: bool = True, seed: int = 0) -> Nf4Weight:
    generator = torch.Generator().manual_seed(seed)
    return nf4.quantize(torch.randn(n, k, generator=generator) * 0.05, double_quant=double_quant)


def make_product(
    rows: int,
    outs: list[int],
    k: int,
    *,
    double_quant: bool = True,
    bias: bool = False,
    ranks: list[int] | None = None,
    epilogue: str = "none",
    seed: int = 0,
    **lora: Any,
) -> ProductCase:
    """outs: outputs of the matrices that are merged. ranks: one adapter each, see `make_lora` for the rest."""
    generator = torch.Generator().manual_seed(seed)
    weights = [make_weight(n, k, double_quant=double_quant, seed=seed + i) for i, n in enumerate(outs)]
    x = torch.randn(rows, k, generator=generator).half()
    factor = torch.exp2(torch.randint(-2, 3, (rows,), generator=generator).float())
    packed = merge([pack_nf4(w) for w in weights]) if len(weights) > 1 else pack_nf4(weights[0])
    case = ProductCase(x, factor, weights, packed, epilogue=epilogue)
    n = sum(outs)
    if bias:
        case.bias = torch.randn(n, generator=generator)
    if epilogue == "add":
        case.residual = torch.randn(rows, n, generator=generator)
    if ranks is not None:
        case.adapters = make_lora(rows, k, outs, ranks, seed=seed, **lora)
        first = len(case.adapters.matrices) - len(outs)
        starts = [sum(outs[:i]) for i in range(len(outs))]
        case.step = shrink(x, factor, case.adapters.lora, range(first, first + len(outs)), starts)
    return case
