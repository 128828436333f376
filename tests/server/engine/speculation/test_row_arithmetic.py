"""On the `cpu` provider, a row's logits do not depend on how many rows the step has: not by one bit.

So a draft that is verified beside a token changes nothing of it, and greedy ties fall the same way.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.kernels.layer_cache import Sequences
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.models.architectures.forward_batch import ForwardBatch
from guanaco.models.architectures.kv_cache import PagedKVCache
from guanaco.models.loading.loader import load_model
from support.adapters.tiny_adapters import make_adapter
from support.kernels.providers import PROVIDERS, provider_ops
from support.models.tiny_models import make_tiny_llama

CPU = torch.device("cpu")
CONTEXT, ROWS = 150, 48  # the context is longer than one run of positions of the attention kernel


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_adapter", [False, True])
def test_logits_have_the_same_bits_at_any_number_of_rows(
    provider: str, dtype: torch.dtype, has_adapter: bool, tmp_path: Path
) -> None:
    model = load_model(make_tiny_llama(tmp_path / "base", kind="gqa"), provider_ops(provider, dtype)).model
    registry = AdapterRegistry(model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=64))
    entry = registry.load("x", make_adapter(tmp_path / "x", model.lora_targets, rank=5, seed=1))
    store = SlotStore(model.lora_targets, 1, CPU, model.ops.place_adapter)
    store.load(0, registry.host_copy(entry.version))
    kv = PagedKVCache(model.config, 32, 16, dtype, CPU)
    tokens = torch.randint(3, 300, (CONTEXT + ROWS,), generator=torch.Generator().manual_seed(1))

    def run(first: int, count: int) -> Tensor:
        last = first + count
        positions = torch.arange(first, last)
        lora = LoraBatch.build([((0, 0.5),)] * count, store.table, CPU) if has_adapter else None
        tables = torch.arange(-(-last // 16), dtype=torch.int32).view(1, -1)
        context, ends = torch.tensor([last], dtype=torch.int32), torch.tensor([0, count], dtype=torch.int32)
        sequences = Sequences(tables, context, ends)
        batch = ForwardBatch(tokens[first:last], positions, positions.clone(), sequences, torch.arange(count), lora)
        return model.forward(batch, kv).clone()

    with torch.inference_mode():
        run(0, CONTEXT)
        alone = torch.cat([run(CONTEXT + i, 1) for i in range(ROWS)])
        for count in (2, 3, 4, 5, 7, 8, 12, 16, 48):
            together = torch.cat([run(CONTEXT + i, min(count, ROWS - i)) for i in range(0, ROWS, count)])
            assert torch.equal(together, alone), f"{count} rows"
