"""The `cpu` provider: every op checks its shapes, then calls the native kernels. Weights are repacked at `prepare`.

NF4 products round activations to 14 bits per group of 64 and sum in exact integers: the relative error against the
product with the stored weights is about 1.2e-4. The number of threads and the other rows of a batch never change a
result. Knows no layer names, requests or files. Chosen by `load_ops("cpu", …)`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guanaco.kernels.cpu import library as native
from guanaco.kernels.cpu.lora import DTYPES, LoraOperand, LoraOperands
from guanaco.kernels.layer_cache import LayerCache, Sequences
from guanaco.kernels.lora_batch import LoraBatch, LoraPair
from guanaco.kernels.nf4 import GROUP_SIZE, Nf4Weight
from guanaco.kernels.ops import HEAD_NORMS, NORMS, PROJECTIONS, Draw, LayerWeights, LinearHandle, PackedWeight

# The norms of `LayerWeights` → fields of the native layer. A norm that a layer lacks stays null there.
_NORM_FIELDS = {"input": "input_norm", "post_attention": "post_norm", "q": "q_norm", "k": "k_norm"}


@dataclass(frozen=True, eq=False)
class CpuLinear:
    """A linear layer as the native kernels read it, and the tensors that its pointers point into."""

    struct: native.Linear
    tensors: tuple[Tensor, ...]
    in_features: int
    out_features: int
    num_bytes: int


class CpuOps:
    """The ops on this machine's processor, activations in `dtype`. See `Ops` for shapes."""

    name = "cpu"
    cache_dtypes: tuple[torch.dtype, ...] = ()

    def __init__(self, *, dtype: torch.dtype, threads: int, isa: str = "auto", in_torch_threads: bool = False) -> None:
        """isa: "auto", or one of `kernels.cpu.library.available_isas()`. in_torch_threads: work on torch's OpenMP
        threads if it has some, for callers whose calls alternate with torch's.

        Raises NativeUnavailable, and MemoryError if the threads can't be started.
        """
        assert dtype in (torch.float32, torch.bfloat16), dtype
        self.device = torch.device("cpu")
        self.dtype = dtype
        self._code = DTYPES[dtype]
        self._context = native.Context(isa, threads, _torch_team() if in_torch_threads else None)
        self.isa, self.threads = self._context.isa, threads
        self.packed_format = f"cpu tiles 1, order {self._context.layout}"

    def pack(self, weight: Nf4Weight) -> PackedWeight | Nf4Weight:
        """Reorder the codes into tiles, with scales of 16 bits (3 % more bytes than double quantisation). A weight
        whose groups cross rows stays as it is."""
        n, k = weight.shape
        if k % GROUP_SIZE != 0:
            return weight
        packed, scales = weight.packed.contiguous(), weight.scales().contiguous()
        tiles = torch.empty(self._context.nf4_bytes(n, k), dtype=torch.uint8)
        self._context.call("nf4_repack", packed.data_ptr(), scales.data_ptr(), n, k, tiles.data_ptr())
        return PackedWeight(tiles, (n, k))

    def prepare(self, weight: Nf4Weight | PackedWeight | Tensor, bias: Tensor | None) -> CpuLinear:
        """Turn an NF4 weight into tiles where `pack` can; keep a dense tensor as it is."""
        if isinstance(weight, Nf4Weight):
            weight = self.pack(weight)
        out_features, in_features = weight.shape
        bias32 = None if bias is None else bias.to(torch.float32).contiguous()
        struct = native.Linear(n=out_features, k=in_features, bias=None if bias32 is None else bias32.data_ptr())
        tensors: tuple[Tensor, ...]
        if isinstance(weight, Tensor):
            assert weight.dtype in DTYPES and weight.device.type == "cpu", (weight.dtype, weight.device)
            tensors = (weight.contiguous(),)
            struct.kind, struct.dtype = native.DENSE, DTYPES[weight.dtype]
        elif isinstance(weight, PackedWeight):
            assert weight.data.numel() == self._context.nf4_bytes(*weight.shape), "a weight of another provider"
            tensors = (weight.data,)
            struct.kind = native.NF4_TILED
        else:
            tensors = (weight.packed.contiguous(), weight.scales().contiguous())
            struct.kind, struct.scales = native.NF4_FLAT, tensors[1].data_ptr()
        struct.data = tensors[0].data_ptr()
        if bias32 is not None:
            tensors = (*tensors, bias32)
        return CpuLinear(struct, tensors, in_features, out_features, sum(t.nbytes for t in tensors))

    def decode_rows(self, weight: LinearHandle, start: int, stop: int, out: Tensor) -> None:
        """See `DecodesRows`. A packed weight has the tiles' 16-bit scales, as products use them."""
        assert isinstance(weight, CpuLinear), "a handle of another provider"
        assert 0 <= start <= stop <= weight.out_features, (start, stop, weight.out_features)
        assert out.shape == (stop - start, weight.in_features) and out.is_contiguous(), out.shape
        assert out.dtype in (torch.float32, torch.bfloat16) and out.device.type == "cpu", (out.dtype, out.device)
        arguments = (start, stop - start, out.data_ptr(), DTYPES[out.dtype])
        self._context.call("decode_rows", ctypes.byref(weight.struct), *arguments)

    def place_adapter(self, pairs: Sequence[LoraPair]) -> list[LoraPair]:
        """The matrices in host memory themselves: nothing is copied."""
        return list(pairs)

    def linear(self, x: Tensor, weight: LinearHandle, lora: LoraBatch | None, module: int) -> Tensor:
        operand = None if lora is None else LoraOperands().operand(lora, (module,))
        return self._product(x, weight, operand, self.dtype)

    def lm_head(self, x: Tensor, weight: LinearHandle) -> Tensor:
        return self._product(x, weight, None, torch.float32)

    def _product(self, x: Tensor, weight: LinearHandle, lora: LoraOperand | None, dtype: torch.dtype) -> Tensor:
        assert isinstance(weight, CpuLinear), "a handle of another provider"
        assert x.dim() == 2 and x.shape[1] == weight.in_features, (x.shape, weight.in_features)
        x = x.contiguous()
        y = torch.empty((x.shape[0], weight.out_features), dtype=dtype)
        self._context.call(
            "linear",
            ctypes.byref(weight.struct),
            None if lora is None else ctypes.byref(lora.struct),
            x.data_ptr(),
            DTYPES[x.dtype],
            x.shape[0],
            y.data_ptr(),
            DTYPES[dtype],
        )
        return y

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return table.index_select(0, token_ids).to(self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert x.dim() == 2 and weight.shape == x.shape[1:], (x.shape, weight.shape)
        x, weight = x.contiguous(), weight.float().contiguous()
        y = torch.empty(x.shape, dtype=self.dtype)
        arguments = (x.data_ptr(), DTYPES[x.dtype], weight.data_ptr(), eps, *x.shape, y.data_ptr(), self._code)
        self._context.call("rms_norm", *arguments)
        return y

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        assert gate.shape == up.shape and gate.dtype == up.dtype, (gate.shape, up.shape)
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty(gate.shape, dtype=self.dtype)
        columns = gate.shape[-1]
        arguments = (DTYPES[gate.dtype], gate.numel() // columns, columns, y.data_ptr(), self._code)
        self._context.call("silu_mul", gate.data_ptr(), up.data_ptr(), *arguments)
        return y

    def rope_and_cache(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, slot_mapping: Tensor
    ) -> Tensor:
        tokens, heads, head_dim = q.shape
        kv_heads = k.shape[1]
        assert k.shape == v.shape == (tokens, kv_heads, head_dim), (q.shape, k.shape, v.shape)
        assert cos.shape == sin.shape == (tokens, head_dim // 2), cos.shape
        assert q.dtype == k.dtype == v.dtype == self.dtype, (q.dtype, k.dtype, v.dtype)
        q, k, v, cos, sin = (x.contiguous() for x in (q, k, v, cos, sin))
        slot_mapping = slot_mapping.contiguous()
        batch = native.Batch(
            num_tokens=tokens, slot_mapping=slot_mapping.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr()
        )
        struct = _cache(cache, batch)
        rotated = torch.empty((tokens, heads, head_dim), dtype=self.dtype)
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), self._code, rotated.data_ptr())
        self._context.call(
            "rope_and_cache", ctypes.byref(batch), ctypes.byref(struct), heads, kv_heads, head_dim, *pointers
        )
        return rotated

    def paged_attention(self, q: Tensor, cache: LayerCache, sequences: Sequences, scale: float) -> Tensor:
        tokens, heads, head_dim = q.shape
        kv_heads = cache.k.shape[2]
        assert cache.k.shape[3] == head_dim and heads % kv_heads == 0, (q.shape, cache.k.shape)
        assert q.dtype == self.dtype, q.dtype
        q, sequences = q.contiguous(), _contiguous(sequences)
        batch = _batch(tokens, sequences)
        struct = _cache(cache, batch)
        out = torch.empty((tokens, heads, head_dim), dtype=self.dtype)
        pointers = (q.data_ptr(), self._code, out.data_ptr())
        self._context.call(
            "attention", ctypes.byref(batch), ctypes.byref(struct), heads, kv_heads, head_dim, scale, *pointers
        )
        return out

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int] | None:
        assert logits.dtype == torch.float32 and len(draws) == len(logits), (logits.dtype, len(draws))
        assert logits.shape[1] > 0, "a vocabulary without tokens"
        logits = logits.contiguous()
        structs = (native.Draw * len(draws))(
            *(native.Draw(d.uniform, d.temperature, d.top_p, d.min_p, d.top_k) for d in draws)
        )
        tokens = torch.empty(len(draws), dtype=torch.int64)
        self._context.call("draw", logits.data_ptr(), *logits.shape, structs, tokens.data_ptr())
        return tokens.tolist()

    def fuse(self, layers: Sequence[LayerWeights], *, head_dim: int, eps: float) -> "CpuLayers | None":
        """All decoder layers as one call into the library: no Python between their parts. None if a layer has a part
        that the library doesn't know: it knows LLaMA's parts and norms of heads."""
        known = [NORMS, (*NORMS, *HEAD_NORMS)]
        if not all(any(layer.has(PROJECTIONS, norms) for norms in known) for layer in layers):
            return None
        return CpuLayers(self._context, self.dtype, layers, head_dim, eps)


class CpuLayers:
    """The `FusedLayers` of this provider. Activations are float32 inside, whatever the dtype of input and output."""

    def __init__(
        self,
        context: native.Context,
        dtype: torch.dtype,
        layers: Sequence[LayerWeights],
        head_dim: int,
        eps: float,
    ) -> None:
        self._context, self._dtype = context, dtype
        self._keep: list[object] = []
        structs = (native.Layer * len(layers))()
        for struct, layer in zip(structs, layers, strict=True):
            for name, handle in layer.projections.items():
                assert isinstance(handle, CpuLinear), "a handle of another provider"
                setattr(struct, name, handle.struct)
            norms = {name: norm.float().contiguous() for name, norm in layer.norms.items()}
            for name, norm in norms.items():
                setattr(struct, _NORM_FIELDS[name], norm.data_ptr())
            self._keep += [layer, norms]
        self._modules = range(len(PROJECTIONS) * len(layers))
        self._hidden = structs[0].q.k
        self._model = native.Model(
            layers=structs,
            num_layers=len(layers),
            hidden=self._hidden,
            heads=structs[0].q.n // head_dim,
            kv_heads=structs[0].k.n // head_dim,
            head_dim=head_dim,
            intermediate=structs[0].gate.n,
            eps=eps,
            attention_scale=head_dim**-0.5,
        )
        self._lora = LoraOperands()

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        caches: Sequence[LayerCache],
        slot_mapping: Tensor,
        sequences: Sequences,
        lora: LoraBatch | None,
    ) -> Tensor:
        tokens = x.shape[0]
        assert x.shape == (tokens, self._hidden) and len(caches) == self._model.num_layers, (x.shape, len(caches))
        assert cos.shape == sin.shape == (tokens, self._model.head_dim // 2), cos.shape
        x, cos, sin, slots = x.contiguous(), cos.contiguous(), sin.contiguous(), slot_mapping.contiguous()
        sequences = _contiguous(sequences)
        batch = _batch(tokens, sequences)
        batch.slot_mapping, batch.cos, batch.sin = slots.data_ptr(), cos.data_ptr(), sin.data_ptr()
        cache_structs = (native.Cache * len(caches))(*(_cache(cache, batch) for cache in caches))
        operand = None if lora is None else self._lora.operand(lora, self._modules)
        y = torch.empty(x.shape, dtype=self._dtype)
        self._context.call(
            "decode",
            ctypes.byref(self._model),
            ctypes.byref(batch),
            cache_structs,
            None if operand is None else ctypes.byref(operand.struct),
            x.data_ptr(),
            DTYPES[x.dtype],
            y.data_ptr(),
            DTYPES[self._dtype],
        )
        return y


def _torch_team() -> int | None:
    """The address of the GOMP_parallel that torch's own parallel loops call; None for a torch without it."""
    try:
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found among the libraries that torch has loaded
    except (OSError, AttributeError):
        return None
    return ctypes.cast(entry, ctypes.c_void_p).value


def _contiguous(s: Sequences) -> Sequences:
    return Sequences(s.block_tables.contiguous(), s.context_lens.contiguous(), s.cu_seqlens_q.contiguous())


def _batch(tokens: int, sequences: Sequences) -> native.Batch:
    """Pointers into `sequences`; the caller must keep its tensors alive."""
    tables, contexts, starts = sequences.block_tables, sequences.context_lens, sequences.cu_seqlens_q
    assert tables.dtype == contexts.dtype == starts.dtype == torch.int32
    assert starts.numel() == contexts.numel() + 1 == tables.shape[0] + 1, (tables.shape, contexts.shape, starts.shape)
    return native.Batch(
        num_tokens=tokens,
        num_sequences=contexts.numel(),
        table_stride=tables.shape[1],
        block_tables=tables.data_ptr(),
        context_lens=contexts.data_ptr(),
        cu_seqlens_q=starts.data_ptr(),
    )


def _cache(cache: LayerCache, batch: native.Batch) -> native.Cache:
    """The cache's pointers. Also writes its block size and dtype into `batch`."""
    assert cache.k.is_contiguous() and cache.v.is_contiguous(), "a cache that is not contiguous"
    assert cache.k.dtype in (torch.float32, torch.bfloat16), cache.k.dtype
    batch.block_size, batch.cache_dtype = cache.block_size, DTYPES[cache.k.dtype]
    return native.Cache(cache.k.data_ptr(), cache.v.data_ptr())
