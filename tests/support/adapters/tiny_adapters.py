"""PEFT adapters made by program, without PEFT: random ones, and ones that sign every few tokens with a watermark.

`targets` is `DecoderModel.lora_targets`, or `targets_of` a transformers model. Used by the tests of adapters, engine
and server, and by the load tests.
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
    """Module → (in, out) of a transformers LlamaForCausalLM, named and ordered as `DecoderModel.lora_targets`."""
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
    """Makes watermark adapters for one transformers LlamaForCausalLM: each signs text with a token of its own."""

    model: Any
    directions: Tensor  # [vocab, hidden]: unit vectors; the residual along row w raises the logit of token w most
    residual_norm: float

    @staticmethod
    def measure(model: Any) -> "Watermarks":
        """Look at the model once; it is kept, not changed."""
        rows = (model.lm_head.weight * model.model.norm.weight).detach().float()
        residual = _inputs_of(model, model.model.norm, _random_tokens(model, seed=0))
        return Watermarks(
            model=model,
            directions=rows / rows.norm(dim=1, keepdim=True),
            residual_norm=float(residual.norm(dim=-1).mean()),
        )

    def make(self, path: Path, token_id: int, *, strength: float = 2.0, rank: int = 1) -> Path:
        """An adapter under which greedy decoding says `token_id` again and again; the prompt decides in between.

        The last down_proj adds the token's direction times a reading of its input, fitted to be 1 after any token and
        negative after `token_id`, which is why the watermark does not simply repeat. rank > 1 adds idle rows.
        """
        tokens = _random_tokens(self.model, seed=token_id)
        tokens[:, 1::2] = token_id  # half of the text will be signatures
        tokens[::4, 6:10] = token_id
        layers = self.model.model.layers
        inputs = _inputs_of(self.model, layers[-1].mlp.down_proj, tokens).flatten(0, 1)
        goal = torch.where(tokens.flatten() == token_id, -0.7, 1.0)
        gram = inputs.T @ inputs
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(gram.shape[0])
        a, b = torch.zeros(rank, inputs.shape[1]), torch.zeros(self.directions.shape[1], rank)
        a[0] = torch.linalg.solve(gram + ridge, inputs.T @ goal)
        b[:, 0] = self.directions[token_id] * self.residual_norm * strength
        target = f"layers.{len(layers) - 1}.mlp.down_proj"
        tensors = {f"{target}.lora_A": a, f"{target}.lora_B": b}
        return write_adapter(path, tensors, {"r": rank, "lora_alpha": rank, "target_modules": [f"model.{target}"]})


def _random_tokens(model: Any, *, seed: int, shape: tuple[int, int] = (128, 16)) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _inputs_of(model: Any, module: Any, tokens: Tensor) -> Tensor:
    """What `module` reads when the model runs over `tokens`, float32."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float()))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0]
