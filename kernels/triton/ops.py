"""The `triton` provider: every op checks its shapes, then launches kernels of the Triton files or a library product.

The number of rows decides which kernel computes a product with NF4 weights. Inside it activations are float16 with one
power of two for each row, and sums are float32; the relative error against the product with the stored weights is about
3e-4. Dense weights, and NF4 weights with rows that are not whole groups of 64, use the library's product. Tested in
Triton's interpreter and compiled for GPUs; NEVER RUN on a GPU so far. Knows no layer names, requests or files. Chosen
by `load_ops("triton", …)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from guanaco.kernels.layer_cache import CODE_LIMITS, LayerCache, Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraPair
from guanaco.kernels.nf4 import Nf4Weight, quantize
from guanaco.kernels.ops import (
    HEAD_NORMS,
    NORMS,
    PROJECTIONS,
    Draw,
    LayerWeights,
    LinearHandle,
    NativeUnavailable,
    NoGpu,
    PackedWeight,
)
from guanaco.kernels.triton import elementwise
from guanaco.kernels.triton import rope as rope_triton
from guanaco.kernels.triton import sampling as sampling_triton
from guanaco.kernels.triton.attention.paged import paged_attention
from guanaco.kernels.triton.configs import multiprocessors, target_of
from guanaco.kernels.triton.elementwise import ScaledRows
from guanaco.kernels.triton.layers import TritonLayers
from guanaco.kernels.triton.pinned import PinnedCopier
from guanaco.kernels.triton.products import nf4_dequant, nf4_dot, nf4_simt
from guanaco.kernels.triton.products.adapter_tables import AdapterTables, place_adapter
from guanaco.kernels.triton.products.lora import LoraStep, TritonLora, shrink
from guanaco.kernels.triton.products.pack import TritonNf4, can_pack, pack_nf4

# All counts of machine code and all comparisons with float64 used this setting; Triton 3.10 will have another default.
triton.knobs.language.default_fp_fusion = True

# What has been run of this provider's code and what has not; the banner and `doctor` show it.
HAS_RUN = "these kernels have never run on a GPU: Triton's interpreter and compiled code only"
# The interpreter has no compute capability; it gets the one that the kernels are tuned for first.
_INTERPRETED_CAPABILITY = (8, 0)
# Up to SIMT_ROWS rows a SIMT kernel computes the product, up to DOT_ROWS a tensor-core kernel that decodes in
# registers.
SIMT_ROWS, DOT_ROWS = 4, 64
SIMT_ROWS_SM100 = 2  # for the tile of four rows ptxas has too few registers there, and spills
# Triton 3.9 has no tensor-core code for sm_75: SIMT is used as long as it reads less than a decoded copy would.
SIMT_ROWS_SM75 = 8
# How many programs of attention fill one multiprocessor. It decides into how many parts a context is split.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# The matrix of `self_check`, and the relative error from which on a product is wrong.
_CHECK_SHAPE, _CHECK_ALLOWED = (64, 256), 1e-2
# How many weights are decoded at a time for a product in float32: 64 MiB.
_TILE_WEIGHTS = 16 << 20


@dataclass(eq=False)
class TritonLinear:
    """A linear layer's weight: packed for the kernels, or as it is stored. `fuse` makes it part of a merged one."""

    weight: TritonNf4 | Nf4Weight | Tensor
    bias: Tensor | None  # float32 [out]
    in_features: int
    out_features: int
    num_bytes: int


class TritonOps:
    """The ops on an NVIDIA GPU, or on the CPU in Triton's interpreter; activations in `dtype`. See `Ops` for shapes."""

    name = "triton"
    packed_format = ""  # a GPU packs the weights faster than a file with packed ones could be read

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        capability: tuple[int, int] | None = None,
        side_stream: bool = False,
    ) -> None:
        """capability: the GPU's compute capability; by default the device's own. side_stream: copy adapters on a stream
        of their own.

        Raises NativeUnavailable if the kernels can't run, or can't run in this dtype.
        """
        assert dtype in (torch.float32, torch.bfloat16, torch.float16), dtype
        on_gpu = device.type == "cuda"
        if device.type == "cpu":
            _need_interpreter()
        self.device = device
        self.dtype = dtype
        self.capability = capability or (
            torch.cuda.get_device_capability(device) if on_gpu else _INTERPRETED_CAPABILITY
        )
        if dtype == torch.bfloat16 and self.capability < (8, 0):
            raise NativeUnavailable(
                f"compute capability {self.capability[0]}.{self.capability[1]} has no bfloat16: use --dtype float16"
            )
        # GPUs before 8.9 have no instructions for e4m3; the interpreter needs none.
        self.cache_dtypes = tuple(d for d in CODE_LIMITS if d == torch.int8 or not on_gpu or self.capability >= (8, 9))
        self.tables = AdapterTables(device)
        self._copier = PinnedCopier(device) if side_stream and on_gpu else None
        self._operand: tuple[LoraBatch | None, TritonLora | None] = (None, None)
        if on_gpu:
            try:
                self.self_check()
            except NativeUnavailable:
                raise
            except (RuntimeError, OSError, AssertionError, triton.TritonError) as error:
                # Reasons: no C compiler for Triton's launcher, a driver that is too old, a kernel that the GPU refuses.
                raise NativeUnavailable(f"the triton kernels don't run here: {str(error).strip()[:300]}") from error

    def self_check(self) -> None:
        """Compare a small product by every kernel with float64. Raises NativeUnavailable if one is wrong.

        The kernels rely on something that Triton doesn't promise: which elements an asm of two words gets. That was
        proven for one version of Triton. This check finds a version or a GPU that does it differently, before the
        server answers requests.
        """
        generator = torch.Generator().manual_seed(0)
        weight = quantize(torch.randn(_CHECK_SHAPE, generator=generator))
        handle = self.prepare(weight, None)
        exact = weight.dequantize().double()
        for num_rows in (1, SIMT_ROWS + 1, DOT_ROWS + 1):
            x = torch.randn(num_rows, _CHECK_SHAPE[1], generator=generator).to(self.dtype)
            expected = x.double() @ exact.t()
            found = self.linear(x.to(self.device), handle, None, 0).cpu().double()
            error = float((found - expected).norm() / expected.norm())
            if not error <= _CHECK_ALLOWED:
                raise NativeUnavailable(
                    f"the triton kernels multiply wrongly here (relative error {error:.2g} with {num_rows} rows, "
                    f"Triton {triton.__version__}): use --provider cpu, and please report loadtest/bench/gpu_check.py"
                )

    # ---- weights and adapters

    def pack(self, weight: Nf4Weight) -> Nf4Weight:
        return weight

    def prepare(self, weight: Nf4Weight | PackedWeight | Tensor, bias: Tensor | None) -> TritonLinear:
        """Pack an NF4 weight with rows of whole groups. Other NF4 weights and dense weights stay as they are stored."""
        assert not isinstance(weight, PackedWeight), "a weight of another provider"
        out_features, in_features = weight.shape
        stored: TritonNf4 | Nf4Weight | Tensor = weight.to(self.device)
        if isinstance(stored, Nf4Weight) and can_pack(stored):
            stored = pack_nf4(stored)
        elif isinstance(stored, Tensor) and self.dtype == torch.float16 and stored.dtype == torch.bfloat16:
            stored = stored.half()  # GPUs without bfloat16 can't multiply it; values below 2^-14 lose digits
        bias32 = None if bias is None else bias.to(self.device, torch.float32)
        num_bytes = stored.nbytes if isinstance(stored, Tensor) else stored.num_bytes
        num_bytes += 0 if bias32 is None else bias32.nbytes
        return TritonLinear(stored, bias32, in_features, out_features, num_bytes)

    def place_adapter(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        return place_adapter(pairs, self.device, self._copier)

    def operand(self, lora: LoraBatch | None, num_rows: int) -> TritonLora | None:
        """The LoRA operand of a batch; made once for all layers of a step."""
        if lora is None:
            return None
        if self._operand[0] is not lora:
            self._operand = (lora, self.tables.operand(lora, num_rows))
        return self._operand[1]

    def bind(self, lora: LoraBatch, operand: TritonLora) -> None:
        """Use `operand` for this batch. A captured CUDA graph reads it at fixed addresses: the caller fills its tensors
        in place before each replay."""
        self._operand = (lora, operand)

    # ---- products

    def linear(self, x: Tensor, weight: LinearHandle, lora: LoraBatch | None, module: int) -> Tensor:
        assert isinstance(weight, TritonLinear), "a handle of another provider"
        assert x.dim() == 2 and x.shape[1] == weight.in_features, (x.shape, weight.in_features)
        if not isinstance(weight.weight, TritonNf4):
            return self._stored_linear(x, weight, lora, module).to(self.dtype)
        y = torch.empty((x.shape[0], weight.out_features), dtype=self.dtype, device=x.device)
        if x.shape[0]:
            scaled = elementwise.scale_rows(x.contiguous())
            step = self.shrink(scaled, self.operand(lora, x.shape[0]), (module,), (0,))
            self.product(scaled, weight.weight, y, bias=weight.bias, lora=step)
        return y

    def shrink(
        self, x: ScaledRows, operand: TritonLora | None, modules: tuple[int, ...], part_starts: tuple[int, ...]
    ) -> LoraStep | None:
        """x · Aᵀ of all modules that share x. They are stacked in a merged weight; part i begins at output
        `part_starts[i]`."""
        if operand is None or max(modules) >= operand.rank.shape[0]:  # no adapter in any slot has such a module
            return None
        return shrink(x.rows, x.factors, operand, modules, part_starts)

    def product(
        self,
        x: ScaledRows,
        weight: TritonNf4,
        y: Tensor,
        *,
        bias: Tensor | None = None,
        lora: LoraStep | None = None,
        epilogue: str = "none",
        residual: Tensor | None = None,
    ) -> None:
        """y = epilogue(x · Wᵀ + bias + LoRA), by the kernel for this number of rows, which is at least 1."""
        kernel = self._kernel(x.rows.shape[0])
        kernel.product(x.rows, x.factors, weight, y, bias=bias, lora=lora, epilogue=epilogue, residual=residual)

    def _kernel(self, num_rows: int) -> Any:
        """The file with the `product` function for this number of rows."""
        if self.capability < (8, 0):
            return nf4_simt if num_rows <= SIMT_ROWS_SM75 else nf4_dequant
        if num_rows <= (SIMT_ROWS_SM100 if self.capability[0] == 10 else SIMT_ROWS):
            return nf4_simt
        return nf4_dot if num_rows <= DOT_ROWS else nf4_dequant

    def _stored_linear(self, x: Tensor, handle: TritonLinear, lora: LoraBatch | None, module: int) -> Tensor:
        """float32 [t, out] for a weight that isn't packed: library products, then each adapter in turn, in float32."""
        assert not isinstance(handle.weight, TritonNf4)
        y = self._library_product(x, handle.weight)
        if handle.bias is not None:
            y += handle.bias
        if lora is not None:
            x32 = x.float()
            for slot, (rows, factors) in lora.rows_by_slot.items():
                pair = lora.table.pairs.get((module, slot))
                if pair is not None:
                    delta = (x32[rows] @ pair.a.float().t()) @ pair.b.float().t()
                    y.index_add_(0, rows, delta * (factors * pair.scale).view(-1, 1))
        return y

    def _library_product(self, x: Tensor, weight: Nf4Weight | Tensor) -> Tensor:
        """float32 [t, out].

        16-bit weights are multiplied as they are if the activations have 16 bits too. That needs a GPU, since torch's
        CPU product rounds its sums. All other weights are multiplied in float32, a tile at a time.
        """
        x32 = x.float()
        if isinstance(weight, Tensor):
            if weight.dtype == torch.float32:
                return x32 @ weight.t()
            if self.dtype != torch.float32 and x.is_cuda:
                return _half_product(x, weight)
        out_features, in_features = weight.shape
        y = torch.empty((x.shape[0], out_features), dtype=torch.float32, device=x.device)
        step = max(1, _TILE_WEIGHTS // in_features)
        for start in range(0, out_features, step):
            stop = min(start + step, out_features)
            y[:, start:stop] = x32 @ _float_rows(weight, start, stop).t()
        return y

    def lm_head(self, x: Tensor, weight: LinearHandle) -> Tensor:
        assert isinstance(weight, TritonLinear), "a handle of another provider"
        if not isinstance(weight.weight, TritonNf4):
            return self._stored_linear(x, weight, None, 0)
        y = torch.empty((x.shape[0], weight.out_features), dtype=torch.float32, device=x.device)
        if x.shape[0]:
            self.product(elementwise.scale_rows(x.contiguous()), weight.weight, y, bias=weight.bias)
        return y

    # ---- everything else

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return elementwise.embedding(token_ids, table, self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.dim() == 2 and weight.shape == x.shape[1:], (x.shape, weight.shape)
        return elementwise.rms_norm(x.contiguous(), weight, eps)[0].to(self.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return elementwise.silu_mul(gate, up)

    def rope_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slot_mapping: Tensor
    ) -> Tensor:
        assert k.shape == v.shape and cos.shape == sin.shape == (q.shape[0], q.shape[2] // 2), (q.shape, k.shape)
        return rope_triton.rope_and_cache(q, k, v, cos, sin, cache, slot_mapping)

    def paged_attention(self, q: Tensor, cache: LayerCache, sequences: Sequences, scale: float) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if q.shape[0]:
            paged_attention(
                q.contiguous(),
                cache,
                sequences,
                scale,
                out,
                max_new=most_new_tokens(q.shape[0], sequences.context_lens.shape[0]),
                target=target_of(self.device),
                programs=_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(self.device),
            )
        return out

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int] | None:
        """See `Ops.draw`. Only the tokens leave the GPU.

        If any row needs noise, one program computes each row. If none does, the rows are spread over the whole GPU and
        no settings are copied.
        """
        random = any(draw.temperature > 0 for draw in draws)
        logits = logits.contiguous()
        tokens: list[int] = (sampling_triton.draw(logits, draws) if random else elementwise.argmax(logits)).tolist()
        return tokens

    def fuse(self, layers: Sequence[LayerWeights], *, head_dim: int, eps: float) -> TritonLayers | None:
        """All decoder layers with q, k, v and gate, up merged. None if one of their weights is not packed, if a layer
        has parts other than LLaMA's and norms of heads, or if only some layers have norms of heads.

        The handles' weights become views of the merged ones, so that no weight is in memory twice.
        """
        known = (NORMS, (*NORMS, *HEAD_NORMS))
        if not any(all(layer.has(PROJECTIONS, norms) for layer in layers) for norms in known):
            return None
        handles = [handle for layer in layers for handle in layer.projections.values()]
        if not all(isinstance(handle, TritonLinear) and isinstance(handle.weight, TritonNf4) for handle in handles):
            return None
        return TritonLayers(self, layers, head_dim=head_dim, eps=eps)


def most_new_tokens(num_tokens: int, num_sequences: int) -> int:
    """An upper bound on one sequence's new tokens, if every sequence has at least one. Exact if all of them decode."""
    return num_tokens - num_sequences + 1


def _float_rows(weight: Nf4Weight | Tensor, start: int, stop: int) -> Tensor:
    """Rows start … stop − 1 in float32."""
    return weight.dequantize_rows(start, stop) if isinstance(weight, Nf4Weight) else weight[start:stop].float()


def _half_product(x: Tensor, weight: Tensor) -> Tensor:
    """float32 [t, out] of 16-bit operands, on a GPU. NEVER RUN so far."""
    if weight.dtype == torch.bfloat16:
        return torch.mm(x.to(torch.bfloat16), weight.t(), out_dtype=torch.float32)
    scaled = elementwise.scale_rows(x.contiguous())
    return torch.mm(scaled.rows, weight.t(), out_dtype=torch.float32) * scaled.factors.unsqueeze(1)


def _need_interpreter() -> None:
    """Raise NoGpu unless Triton's interpreter is on, and NativeUnavailable if it has not been taught inline PTX."""
    if not triton.knobs.runtime.interpret:
        raise NoGpu(
            "the triton provider needs an NVIDIA GPU and torch built with CUDA, and torch finds none: "
            "use --provider cpu (or, to try the kernels in Triton's interpreter, loadtest/bench/gpu_check.py)"
        )
    from triton.runtime.interpreter import InterpreterBuilder

    if InterpreterBuilder.create_inline_asm.__module__ == InterpreterBuilder.__module__:
        raise NativeUnavailable(
            "TRITON_INTERPRET is set, but Triton's interpreter does not know inline PTX: the tests and "
            "loadtest/bench/gpu_check.py teach it; to serve, unset it and use --provider cpu"
        )
