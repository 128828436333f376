"""Gradients through the served weights: against float64, finite differences, and PEFT with bitsandbytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from guanaco.server.training.quantized import load_base
from support.models.tiny_models import make_tiny_llama
from support.training.oracles import (
    adapter_parameters,
    bitsandbytes_base,
    float64_copy,
    gradients,
    largest_error,
    loss_of,
    with_adapter,
)

TOKENS = torch.randint(3, 384, (2, 19), generator=torch.Generator().manual_seed(5))
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"kind": "tied"},
    "llama-odd": {"kind": "odd"},
    "llama-biased": {"kind": "mlp_bias", "attention_bias": True},
    "llama-rope": {"kind": "llama3_rope"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2-odd": {"model_type": "qwen2", "kind": "odd"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", "kind": "mha", "tie_word_embeddings": True, "head_dim": 32},
}
# Widths that are multiples of 64: elsewhere bitsandbytes is wrong on processors with AVX-512.
# Stored in float32: from a 16-bit checkpoint it decodes to 16 bits.
PEER: dict[str, Any] = {"intermediate_size": 192, "dtype": torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_float64_over_the_decoded_weights(name: str, tmp_path: Path) -> None:
    base = load_base(make_tiny_llama(tmp_path, **MODELS[name]))
    expected = gradients(with_adapter(float64_copy(base)), TOKENS)
    ours = gradients(with_adapter(base), TOKENS)
    assert len(ours) == 2 * 7 * 2
    assert largest_error(ours, expected) < 1e-5


@pytest.mark.parametrize("rank", [1, 8, 33])
def test_every_rank(rank: int, tmp_path: Path) -> None:
    base = load_base(make_tiny_llama(tmp_path))
    expected = gradients(with_adapter(float64_copy(base), rank=rank), TOKENS)
    assert largest_error(gradients(with_adapter(base, rank=rank), TOKENS), expected) < 1e-5


def test_a_step_along_the_gradient_changes_the_loss_as_much_as_it_says(tmp_path: Path) -> None:
    """Central differences in float64 along random directions of all matrices at once."""
    base = load_base(make_tiny_llama(tmp_path))
    exact = with_adapter(float64_copy(base))
    ours = gradients(with_adapter(base), TOKENS)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in adapter_parameters(exact)}
        losses = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for name, parameter in adapter_parameters(exact):
                    parameter += step * direction[name]
                losses.append(loss_of(exact, TOKENS))
            for name, parameter in adapter_parameters(exact):
                parameter += 1e-6 * direction[name]
        slope = float(losses[0] - losses[1]) / 2e-6
        predicted = sum(float((ours[name] * d).sum()) for name, d in direction.items())
        assert abs(slope - predicted) <= 1e-4 * abs(slope)


@pytest.mark.parametrize("quantized", ["single", "double"])
def test_gradients_are_those_of_peft_with_bitsandbytes(quantized: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, quantized=quantized, **PEER)
    expected = gradients(with_adapter(bitsandbytes_base(path)), TOKENS)
    assert largest_error(gradients(with_adapter(load_base(path)), TOKENS), expected) < 2e-4


def test_fifty_steps_have_the_losses_of_peft_with_bitsandbytes(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, quantized=True, **PEER)
    curves = [_train(model, 50) for model in (load_base(path), bitsandbytes_base(path))]
    assert curves[0][0] - curves[0][-1] > 0.5, "nothing was learned"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-3


def _train(base: Any, steps: int) -> list[float]:
    model = with_adapter(base)
    optimizer = torch.optim.AdamW([p for _, p in adapter_parameters(model)], lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, TOKENS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = gradients(with_adapter(load_base(make_tiny_llama(tmp_path))), TOKENS)
    for reentrant in (False, True):
        model = with_adapter(load_base(tmp_path))
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        assert largest_error(gradients(model, TOKENS), plain) < 1e-5


def test_four_times_four_rows_are_sixteen(tmp_path: Path) -> None:
    model = with_adapter(load_base(make_tiny_llama(tmp_path)))
    rows = torch.randint(3, 384, (16, 11), generator=torch.Generator().manual_seed(1))
    whole = gradients(model, rows)
    model.zero_grad()
    for some in rows.split(4):
        (loss_of(model, some) / 4).backward()
    parts = {name: p.grad.double() for name, p in adapter_parameters(model)}
    assert largest_error(parts, whole) < 1e-5


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    exact = gradients(with_adapter(load_base(make_tiny_llama(tmp_path))), TOKENS)
    half = gradients(with_adapter(load_base(tmp_path, dtype=torch.bfloat16)), TOKENS)
    assert largest_error(half, exact) < 0.1
