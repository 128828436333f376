"""Mistral, Qwen 2 and Qwen 3 against transformers on random small models, and sliding windows."""

from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch

from guanaco.adapters.peft.weights import load_adapter
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.kernels import load_ops
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.models.architectures.config_json import parse_config
from guanaco.models.errors import ModelError
from guanaco.models.loading.loader import load_model
from support.adapters.tiny_adapters import make_adapter
from support.models.oracles import (
    PagedRun,
    follow_greedy,
    oracle_logits,
    reference_ops,
    relative_error,
    transformers_oracle,
)
from support.models.tiny_models import make_tiny_llama

CPU = torch.device("cpu")
HEADS = {"head_dim": 16}
ARCHITECTURES = ("mistral", "qwen2", "qwen3")
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-mha": {"model_type": "mistral", "kind": "mha", "sliding_window": 512},
    "mistral-odd": {"model_type": "mistral", "kind": "odd", "sliding_window": None, "eos_token_id": [2, 5]},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-mha-tied": {"model_type": "qwen2", "kind": "mha", "tie_word_embeddings": True},
    "qwen2-odd": {"model_type": "qwen2", "kind": "odd", "eos_token_id": [2, 5]},
    "qwen2-rope": {"model_type": "qwen2", "kind": "linear_rope"},
    "qwen3": {"model_type": "qwen3", **HEADS},
    "qwen3-mha-tied": {"model_type": "qwen3", "kind": "mha", "tie_word_embeddings": True, **HEADS},
    "qwen3-odd": {"model_type": "qwen3", "kind": "odd", "eos_token_id": [2, 5], **HEADS},
    "qwen3-biased-rope": {"model_type": "qwen3", "kind": "llama3_rope", "attention_bias": True, **HEADS},
}
PROMPTS = [[Random(n).randrange(384) for _ in range(n)] for n in (1, 5, 21, 40)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, **MODELS[name])
    loaded = load_model(path, reference_ops())
    assert loaded.config.eos_token_ids == ((2, 5) if "eos_token_id" in MODELS[name] else (2,))
    report = follow_greedy(loaded.model, transformers_oracle(path), PROMPTS, 24)
    assert report.largest_error < 1e-4
    assert report.num_mismatches == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cpu_provider_fuses_and_is_near_the_reference(name: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, **MODELS[name])
    native = load_model(path, load_ops("cpu", device=CPU, dtype=torch.float32)).model
    assert native.is_fused
    expected = PagedRun(load_model(path, reference_ops()).model).step([(0, PROMPTS[3])], every_row=True)
    assert relative_error(PagedRun(native).step([(0, PROMPTS[3])], every_row=True), expected) < 5e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_triton_provider_fuses_and_is_near_the_reference(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = make_tiny_llama(tmp_path, **MODELS[name], intermediate_size=192)
    model = load_model(path, load_ops("triton", device=CPU, dtype=torch.float32)).model
    assert model.is_fused
    expected = PagedRun(load_model(path, reference_ops()).model).step([(0, PROMPTS[1])], every_row=True)
    assert relative_error(PagedRun(model).step([(0, PROMPTS[1])], every_row=True), expected) < 5e-3


@pytest.mark.parametrize(("provider", "tolerance"), [("reference", 1e-4), ("cpu", 5e-3), ("triton", 5e-3)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_of_all_projections_are_those_of_peft_in_a_mixed_batch(
    name: str, provider: str, tolerance: float, tmp_path: Path
) -> None:
    if provider == "triton":
        pytest.importorskip("triton")
    prompts = PROMPTS if provider != "triton" else [ids[:3] for ids in PROMPTS]  # Triton's interpreter is slow
    path = make_tiny_llama(tmp_path / "base", **MODELS[name], intermediate_size=192)
    model = load_model(path, load_ops(provider, device=CPU, dtype=torch.float32)).model
    assert model.is_fused == (provider != "reference")
    adapters = [make_adapter(tmp_path / f"a{seed}", model.lora_targets, rank=3 + seed, seed=seed) for seed in (0, 1)]
    oracle = peft.PeftModel.from_pretrained(transformers_oracle(path), adapters[0], adapter_name="0")
    oracle.load_adapter(adapters[1], adapter_name="1")
    oracle.eval()
    store = SlotStore(model.lora_targets, 2, CPU, model.ops.place_adapter)
    for slot, adapter in enumerate(adapters):
        store.load(slot, load_adapter(adapter, model.lora_targets))
    lengths = [len(ids) for ids in prompts]
    users: list[int | None] = [None, 0, 1, 0]
    rows = [
        ((user, 1.0),) if user is not None else () for user, n in zip(users, lengths, strict=True) for _ in range(n)
    ]
    lora = LoraBatch.build(rows, store.table, CPU)
    logits = PagedRun(model).step(list(enumerate(prompts)), every_row=True, lora=lora).split(lengths)
    for user, ids, ours in zip(users, prompts, logits, strict=True):
        with oracle.disable_adapter():
            base = expected = oracle_logits(oracle, ids)
        if user is not None:
            oracle.set_adapter(str(user))
            expected = oracle_logits(oracle, ids)
            assert relative_error(base, expected) > 10 * tolerance, "the adapter changes the logits"
        assert relative_error(ours, expected) < tolerance


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bitsandbytes_checkpoint_and_the_cache_are_the_same_model(name: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "nf4", **MODELS[name], quantized=True)
    logits = PagedRun(load_model(path, reference_ops()).model).step([(0, PROMPTS[2])], every_row=True)
    assert relative_error(logits, oracle_logits(transformers_oracle(path), PROMPTS[2])) < 1e-4
    dense = make_tiny_llama(tmp_path / "dense", **MODELS[name])
    loads = [load_model(dense, reference_ops(), cache_dir=tmp_path / "cache") for _ in range(2)]
    assert [one.origin for one in loads] == ["quantized", "cache"]
    assert loads[0].fingerprint == loads[1].fingerprint


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 1000}, 1000),
        ({"model_type": "qwen2", "sliding_window": 1000}, None),
        ({"model_type": "qwen2", "sliding_window": 1000, "use_sliding_window": True}, 1000),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"] * 32}, None),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
    ],
)
def test_a_sliding_window_is_refused_where_a_sequence_may_reach_it(fields: dict[str, Any], window: int | None) -> None:
    config = parse_config(fields, "config.json")
    assert config.sliding_window == window
    if window is None:
        config.check_window("config.json", None)
        return
    config.check_window("config.json", window)
    for limit in (None, window + 1):
        with pytest.raises(ModelError, match=rf"sliding_window = {window} .*--max-model-len {window}"):
            config.check_window("config.json", limit)


def test_a_model_with_a_window_that_is_reached_is_not_loaded(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path, model_type="mistral", sliding_window=64)
    with pytest.raises(ModelError, match="sliding_window = 64"):
        load_model(path, reference_ops())
    assert load_model(path, reference_ops(), max_model_len=64).config.sliding_window == 64


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_biases_that_the_architecture_does_not_have_are_refused(model_type: str, field: str) -> None:
    with pytest.raises(ModelError, match=f"{field} = True is not supported"):
        parse_config({"model_type": model_type, field: True}, "config.json")
