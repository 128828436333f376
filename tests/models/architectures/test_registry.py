"""A made-up architecture with biases and norms of its own is served by registering it, without an edit elsewhere."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from guanaco.kernels import load_ops
from guanaco.kernels.lora_batch import LoraBatch, LoraPair, LoraTable
from guanaco.models.architectures.architecture import Architecture
from guanaco.models.architectures.config import ModelConfig
from guanaco.models.architectures.config_json import parse_config
from guanaco.models.architectures.decoder import MLP, Attention, Layer, LayerParts, decoder_layer
from guanaco.models.architectures.layer_spec import LayerSpec, Norm, llama_projections
from guanaco.models.architectures.layers import RMSNorm, rope_frequencies
from guanaco.models.architectures.llama import LLAMA
from guanaco.models.architectures.qwen3 import QWEN3
from guanaco.models.architectures.registry import registered
from guanaco.models.loading.loader import load_model
from guanaco.models.loading.quantize import full_name, quantize_checkpoint, weight_shapes
from support.models.oracles import PagedRun, reference_ops, relative_error, served_state

FIELDS = {
    "architectures": ["ParrotForCausalLM"], "model_type": "parrot", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class ParrotLayer:
    """Norms after attention and MLP instead of before them."""

    attention: Attention
    mlp: MLP
    first: RMSNorm
    second: RMSNorm

    def __call__(self, x: Tensor, angles: Any, batch: Any, cache: Any) -> Tensor:
        x = x + self.first(self.attention(x, angles, batch, cache))
        return x + self.second(self.mlp(x, batch))

    def weights(self) -> None:
        return None


def parrot_layer(parts: LayerParts) -> ParrotLayer:
    return ParrotLayer(parts.attention(), parts.mlp(), parts.norms["after_attention"], parts.norms["after_mlp"])


def parrot_spec(config: ModelConfig) -> LayerSpec:
    norms = tuple(Norm(name, config.hidden_size) for name in ("after_attention", "after_mlp"))
    return LayerSpec(llama_projections(config, ("self_attn.o_proj", "mlp.up_proj")), norms)


PARROT = Architecture("ParrotForCausalLM", "parrot", parrot_spec, parrot_layer)


def plainly(state: dict[str, Tensor], config: ModelConfig, ids: list[int]) -> Tensor:
    """The same model in plain PyTorch."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], state[name], config.rms_norm_eps)

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(len(ids))[:, None] * rope_frequencies(config)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    x = state["model.embed_tokens.weight"][ids]
    for i in range(config.num_layers):

        def linear(x: Tensor, name: str, p: str = f"model.layers.{i}.") -> Tensor:
            return F.linear(x, state[f"{p}{name}_proj.weight"], state.get(f"{p}{name}_proj.bias"))

        q, k, v = (linear(x, f"self_attn.{n}").unflatten(-1, (-1, config.head_dim)) for n in "qkv")
        heads = [t.transpose(0, 1) for t in (rotated(q), rotated(k), v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)
        x = x + norm(linear(mixed, "self_attn.o"), f"model.layers.{i}.after_attention.weight")
        inner = F.silu(linear(x, "mlp.gate")) * linear(x, "mlp.up")
        x = x + norm(linear(inner, "mlp.down"), f"model.layers.{i}.after_mlp.weight")
    return F.linear(norm(x, "model.norm.weight"), state["lm_head.weight"])


def test_a_made_up_architecture_runs_on_reference_and_cpu(tmp_path: Path) -> None:
    with registered(PARROT):
        config = parse_config(FIELDS, "config.json")
        torch.manual_seed(0)
        tensors = {
            name if name.startswith("lm_head") else f"model.{name}": torch.randn(shape) / shape[-1] ** 0.5
            for name, shape in weight_shapes(config)
        }
        save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(FIELDS))
        ids = list(range(3, 33))
        expected = plainly(served_state(tmp_path), config, ids)
        cpu = load_ops("cpu", device=torch.device("cpu"), dtype=torch.float32)
        for ops, tolerance in ((reference_ops(), 1e-4), (cpu, 5e-3)):
            model = load_model(tmp_path, ops).model
            assert not model.is_fused
            assert relative_error(PagedRun(model).step([(0, ids)], every_row=True), expected) < tolerance


HERON_NAMES = {
    "attn.query": "self_attn.q_proj", "attn.key": "self_attn.k_proj", "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
    "attn.norm": "input_layernorm", "ffn.norm": "post_attention_layernorm",
    "attn.query_norm": "self_attn.q_norm", "attn.key_norm": "self_attn.k_norm",
}  # fmt: skip


def heron_spec(config: ModelConfig) -> LayerSpec:
    """Qwen3's layer with biases, under names of its own."""
    ours = {theirs: ours for ours, theirs in HERON_NAMES.items()}
    spec = QWEN3.layer(replace(config, attention_bias=True))
    return LayerSpec(
        tuple(replace(one, name=ours[one.name]) for one in spec.projections),
        tuple(replace(one, name=ours[one.name]) for one in spec.norms),
    )


def heron_layer(parts: LayerParts) -> Layer:
    linears = {HERON_NAMES[name]: linear for name, linear in parts.linears.items()}
    norms = {HERON_NAMES[name]: norm for name, norm in parts.norms.items()}
    return decoder_layer(replace(parts, linears=linears, norms=norms))


HERON = Architecture("HeronForCausalLM", "heron", heron_spec, heron_layer)


def as_qwen3(name: str) -> str:
    """A tensor of Heron under Qwen3's name."""
    for ours, theirs in HERON_NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def write_model(path: Path, fields: dict[str, Any], state: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(fields))
    return path


def adapted_logits(path: Path, ops: Any) -> Tensor:
    """With an adapter of every projection on half of the rows."""
    model = load_model(path, ops).model
    assert model.is_fused == (ops.name == "cpu")
    pairs = {}
    for module, (wide, out) in enumerate(model.lora_targets.values()):
        generator = torch.Generator().manual_seed(module)
        a, b = (torch.randn(shape, generator=generator) for shape in ((2, wide), (out, 2)))
        pairs[module, 0] = LoraPair(a, b, 0.05)
    lora = LoraBatch.build([((0, 1.0),)] * 15 + [()] * 15, LoraTable(pairs), torch.device("cpu"))
    return PagedRun(model).step([(0, list(range(3, 33)))], every_row=True, lora=lora)


@pytest.mark.parametrize("stored", ["dense", "nf4"])
def test_projections_of_other_names_are_quantised_fused_and_adapted(stored: str, tmp_path: Path) -> None:
    """By the names that the architecture gives: the same numbers as the same weights have under Qwen3's names."""
    fields = {**FIELDS, "architectures": ["HeronForCausalLM"], "model_type": "heron", "head_dim": 16}
    twin = {**fields, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}
    with registered(HERON):
        torch.manual_seed(0)
        shapes = weight_shapes(parse_config(fields, "config.json"))
        state = {full_name(name): torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes}
        heron = write_model(tmp_path / "heron", fields, state)
        qwen3 = write_model(tmp_path / "qwen3", twin, {as_qwen3(name): tensor for name, tensor in state.items()})
        if stored == "nf4":
            report = quantize_checkpoint(heron, tmp_path / "quantised")
            assert (report.num_quantized, report.ignored) == (14, ())
            heron = tmp_path / "quantised"
        for ops in (reference_ops(), load_ops("cpu", device=torch.device("cpu"), dtype=torch.float32)):
            assert torch.equal(adapted_logits(heron, ops), adapted_logits(qwen3, ops))


def test_a_model_type_that_is_taken_is_not_registered_again() -> None:
    with pytest.raises(ValueError, match="'llama' is registered already"), registered(LLAMA):
        pass
