"""What the files of a model and of its adapters have and nothing uses is in the runtime's notes, and in the banner."""

import json
from io import StringIO
from pathlib import Path

import gguf
import pytest
import torch
from rich.console import Console

from guanaco.models.loading.gguf_checkpoint import gguf_name
from guanaco.models.loading.loader import load_model
from guanaco.server.bootstrap.runtime import build_runtime
from guanaco.server.commands.serve import _show_banner
from guanaco.server.config import load_settings
from support.adapters.tiny_adapters import make_adapter
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file without a tokenizer of its own, and the tokenizer's files beside it."""
    path = make_tiny_llama(tmp_path_factory.mktemp("model") / "m", dtype=torch.float32)
    config = json.loads((path / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path / "m.gguf"), "llama")
    names = {
        "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
    }  # fmt: skip
    for key, name in names.items():
        writer.add_uint32(f"llama.{key}", config[name])
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32("general.sampling.temp", 0.25)
    writer.add_uint32("general.sampling.top_k", 7)
    writer.add_uint32("llama.made_up", 1)
    from safetensors.torch import load_file

    for name, tensor in load_file(path / "model.safetensors").items():
        writer.add_tensor(gguf_name(name.removeprefix("model.")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (path / "model.safetensors").unlink()
    (path / "generation_config.json").write_text(json.dumps({"top_k": 5, "made_up": 2}))
    return path


def test_notes_of_every_family_reach_the_banner(model: Path, tmp_path: Path) -> None:
    targets = load_model(model, reference_ops()).model.lora_targets
    make_adapter(tmp_path / "a", targets, exclude_modules=["nothing"])
    fields = {"model": str(model), "provider": "reference", "kv_cache_memory": "64KiB", "cache": str(tmp_path)}
    settings, text = load_settings({**fields, "adapter": [f"a={tmp_path / 'a'}"]}), StringIO()
    runtime = build_runtime(settings, Console(file=StringIO()))
    _show_banner(Console(file=text, width=400), settings, runtime, 8000, has_keys=False)
    for part in (
        "llama.made_up",
        "config.json beside m.gguf",
        "made_up = 2",
        "tokenizer that is in the GGUF",
        "nothing",
    ):
        assert part in text.getvalue(), part


def test_a_gguf_files_sampling_defaults_yield_to_generation_config(model: Path, tmp_path: Path) -> None:
    fields = {"model": str(model), "provider": "reference", "kv_cache_memory": "64KiB", "cache": str(tmp_path)}
    runtime = build_runtime(load_settings(fields), Console(file=StringIO()))
    config = runtime.base.generation_config
    assert (config["temperature"], config["top_k"]) == (0.25, 5)
