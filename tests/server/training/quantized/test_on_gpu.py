"""What is meant for a GPU, with bitsandbytes on a CPU: the served base's gradients and fingerprint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from guanaco.server.training.loop import trainer_arguments
from guanaco.server.training.quantized import base_fingerprint, load_base, load_base_on
from guanaco.server.training.recipes import recipe_for
from support.models.oracles import plain_bitsandbytes
from support.models.tiny_models import make_tiny_llama
from support.training.oracles import gradients, largest_error, with_adapter

TOKENS = torch.randint(3, 384, (2, 19), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("source", [{}, {"quantized": "double"}])
def test_its_gradients_and_fingerprint_are_those_of_the_served_base(source: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain_bitsandbytes()
    path = make_tiny_llama(tmp_path / "model", intermediate_size=192, dtype=torch.float32, **source)
    served = load_base(path)
    base = load_base_on("cpu", path, dtype=torch.float32)
    assert base_fingerprint(base) == base_fingerprint(served)
    assert not any(p.requires_grad for p in base.parameters())
    assert "Linear4bit" in type(base.model.layers[0].mlp.up_proj).__name__
    assert largest_error(gradients(with_adapter(base), TOKENS), gradients(with_adapter(served), TOKENS)) < 2e-4


def test_a_paged_optimiser_is_for_a_gpu(tmp_path: Path) -> None:
    recipe = recipe_for("guanaco-2023", 10**9, {})
    for device, name in (("cpu", "adamw_torch"), ("cuda", "paged_adamw_32bit")):
        assert trainer_arguments(recipe, tmp_path, 4, has_eval=False, device=device).optim.value == name
    default = trainer_arguments(recipe_for("default", 10**9, {}), tmp_path, 4, has_eval=False, device="cuda")
    assert default.optim.value == "adamw_torch"
