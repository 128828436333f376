"""A loaded adapter takes the memory that is counted for it."""

import pytest
import safetensors.torch

from guanaco.adapters.peft.weights import load_adapter
from support.adapters.tiny_adapters import make_adapter, targets_of
from support.models.tiny_models import tiny_llama

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("is_partly_zero", [False, True])
def test_pairs_without_effect_leave_no_memory_behind(tmp_path, is_partly_zero):
    targets = targets_of(tiny_llama(kind="gqa"))
    path = make_adapter(tmp_path / "a", targets, rank=4)
    if is_partly_zero:
        tensors = safetensors.torch.load_file(path / WEIGHTS)
        for key in [key for key in tensors if "lora_B" in key][1:]:
            tensors[key].zero_()
        safetensors.torch.save_file(tensors, path / WEIGHTS)
    adapter = load_adapter(path, targets)
    assert (adapter.modules_applied < len(targets)) == is_partly_zero
    matrices = [matrix for pair in adapter.pairs.values() for matrix in (pair.a, pair.b)]
    storages = {matrix.untyped_storage().data_ptr(): matrix.untyped_storage().nbytes() for matrix in matrices}
    # Each matrix starts at a cache line.
    assert adapter.num_bytes <= sum(storages.values()) < adapter.num_bytes + 64 * len(matrices)
