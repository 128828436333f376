"""Oracles of a training step: the same model over dense float64 weights, and PEFT with bitsandbytes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input; transformers' own goes through float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.double(), requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def float64_copy(base: Any) -> Any:
    """A dense transformers model in float64 that holds the weights of `base` (from load_base), decoded."""
    from transformers import AutoModelForCausalLM

    from guanaco.server.training.quantized.linear import ServedEmbedding, ServedLinear

    model = AutoModelForCausalLM.from_config(base.config, dtype=torch.float64, attn_implementation="sdpa")
    for name, module in base.named_modules():
        if isinstance(module, ServedLinear):
            dense = nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, dtype=torch.float64
            )
            dense.weight.data = module.decoded().double()
            if module.bias is not None:
                dense.bias.data = module.bias.double()
            _replace(model, name, dense)
        elif isinstance(module, ServedEmbedding):
            _replace(model, name, nn.Embedding(*module.weight.shape, _weight=module.weight.double()))
        elif "RMSNorm" in type(module).__name__:
            _replace(model, name, ExactNorm(module.weight, module.variance_epsilon))
    return model.requires_grad_(False)


def with_adapter(model: Any, *, rank: int = 4, seed: int = 0, targets: list[str] | None = None) -> Any:
    """`model` in PEFT with LoRA matrices A and B that are all random, the same ones for the same names and shapes.

    They change the model as much as training would: large ones make it so steep that float32 itself is not exact.
    """
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets or TARGETS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter_parameters(wrapped):
        noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 / 4
        parameter.data = noise.to(parameter.dtype)
    return wrapped


def adapter_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss of next tokens, float64, by the name of the parameter."""
    model.zero_grad()
    loss_of(model, tokens).backward()
    return {name: p.grad.double() for name, p in adapter_parameters(model)}


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """The mean loss of next tokens of rows [batch, length]."""
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def largest_error(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative l2 error among the gradients of two models."""
    assert ours.keys() == expected.keys()
    assert ours
    return max(float((ours[name] - e).norm() / e.norm()) for name, e in expected.items())


def bitsandbytes_base(path: Path) -> Any:
    """The bitsandbytes checkpoint at `path` as its users train on it: transformers' model with Linear4bit, float32."""
    from transformers import AutoModelForCausalLM

    from support.models.oracles import plain_bitsandbytes

    plain_bitsandbytes()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.float32, "it would decode to 16 bits"
    return model.requires_grad_(False)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
