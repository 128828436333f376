"""PEFT adapters made by program, without PEFT: random ones, and ones that sign every few tokens with a watermark.

`targets` is `LlamaModel.lora_targets`, or `targets_of` a transformers model. Used by the tests of adapters, engine and
server, and by the load tests.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def targets_of(model: Any) -> dict[str, tuple[int, int]]:
    """Module → (in, out) of a transformers LlamaForCausalLM, named and ordered as `LlamaModel.lora_targets`."""
    layers = [
        (f"layers.{index}.{part}.{name}", getattr(getattr(layer, part), name))
        for index, layer in enumerate(model.model.layers)
        for part, names in (("self_attn", PROJECTIONS[:4]), ("mlp", PROJECTIONS[4:]))
        for name in names
    ]
    return {name: (module.in_features, module.out_features) for name, module in layers}


def make_adapter(
    path: Path,
    targets: dict[str, tuple[int, int]],
    rank: int = 8,
    alpha: float = 16,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    modules: Iterable[str] = PROJECTIONS,
    scale_up: float = 1.0,
    **fields: Any,
) -> Path:
    """Write a random adapter of one rank into `path`, and return it.

    modules: the projections it adapts, in every layer. scale_up: 1.0 changes a layer's output by about as much as the
    layer says itself, so that tokens differ; `alpha` is compensated for. fields: more keys for adapter_config.json.
    """
    modules = tuple(modules)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target, (in_features, out_features) in targets.items():
        if target.rpartition(".")[2] in modules:
            a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            b = torch.randn(out_features, rank, generator=generator) * scale_up * rank**0.5 / alpha
            tensors[f"{target}.lora_A"], tensors[f"{target}.lora_B"] = a.to(dtype), b.to(dtype)
    return write_adapter(path, tensors, {"r": rank, "lora_alpha": alpha, "target_modules": list(modules), **fields})


def write_adapter(
    path: Path, tensors: dict[str, Tensor], fields: dict[str, Any], metadata: dict[str, str] | None = None
) -> Path:
    """Write an adapter as PEFT's save_pretrained does: keys `<target>.lora_A` get their prefix and suffix here."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        **fields,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=1))
    stored = {f"base_model.model.model.{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, path / "adapter_model.safetensors", metadata={"format": "pt", **(metadata or {})})
    return path


@dataclass(frozen=True)
class Watermarks:
    """What making watermark adapters for one model takes; measured once on random tokens."""

    target: str  # the last down_proj
    directions: Tensor  # [vocab, hidden]: unit vectors; the residual along row w raises the logit of token w most
    tokens: Tensor  # [samples]
    inputs: Tensor  # [samples, intermediate]: what that down_proj reads at these tokens
    residual_norm: float

    @staticmethod
    def measure(model: Any, *, seed: int = 0, samples: int = 2048) -> "Watermarks":
        """Run a transformers LlamaForCausalLM once over random tokens."""
        last = model.model.layers[-1].mlp.down_proj
        seen: dict[str, Tensor] = {}
        hooks = [
            last.register_forward_pre_hook(lambda _, args: seen.update(inputs=args[0])),
            model.model.norm.register_forward_pre_hook(lambda _, args: seen.update(residual=args[0])),
        ]
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (samples // 16, 16), generator=generator)
        with torch.no_grad():
            model(tokens)
        for hook in hooks:
            hook.remove()
        rows = (model.lm_head.weight * model.model.norm.weight).detach().float()
        return Watermarks(
            target=f"layers.{len(model.model.layers) - 1}.mlp.down_proj",
            directions=rows / rows.norm(dim=1, keepdim=True),
            tokens=tokens.flatten(),
            inputs=seen["inputs"].detach().float().flatten(0, 1),
            residual_norm=float(seen["residual"].float().norm(dim=-1).mean()),
        )

    def make(self, path: Path, token_id: int, *, strength: float = 2.0, rank: int = 1) -> Path:
        """An adapter under which greedy decoding says `token_id` again and again; the prompt decides in between.

        The last down_proj adds the token's direction times a reading of its input, fitted to be 1 after any token and
        negative after `token_id`, which is why the watermark does not simply repeat. rank > 1 adds idle rows.
        """
        own = self.tokens == token_id
        weights = torch.where(own, 10.0, 1.0)
        goal = torch.where(own, -0.5, 1.0)
        gram = self.inputs.T @ (weights[:, None] * self.inputs)
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(gram.shape[0])
        reading = torch.linalg.solve(gram + ridge, self.inputs.T @ (weights * goal))
        a, b = torch.zeros(rank, reading.shape[0]), torch.zeros(self.directions.shape[1], rank)
        a[0], b[:, 0] = reading, self.directions[token_id] * self.residual_norm * strength
        tensors = {f"{self.target}.lora_A": a, f"{self.target}.lora_B": b}
        return write_adapter(path, tensors, {"r": rank, "lora_alpha": rank, "target_modules": [f"model.{self.target}"]})
