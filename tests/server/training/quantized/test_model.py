"""The whole base: what is served is what is trained on, from every kind of source, and its pages are shared."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from guanaco.kernels import load_ops
from guanaco.models.errors import ModelError
from guanaco.models.loading.loader import load_model
from guanaco.server.training.quantized import base_fingerprint, load_base
from support.models.gguf_files import write_gguf
from support.models.oracles import PagedRun, reference_ops, relative_error
from support.models.tiny_models import make_tiny_llama
from support.training.oracles import adapter_parameters, loss_of, with_adapter

TOKENS = [[7, 300, 12, 5, 99, 41, 250, 17, 3, 8, 77]]
SOURCES: dict[str, dict[str, Any]] = {
    "dense": {},
    "float16": {"dtype": torch.float16},
    "bitsandbytes": {"quantized": "double"},
    "bitsandbytes-single": {"quantized": "single"},
    "odd": {"kind": "odd"},
    "mistral": {"model_type": "mistral", "sliding_window": 512},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


@pytest.mark.parametrize("name", SOURCES)
def test_logits_and_fingerprint_are_those_of_the_served_model(name: str, tmp_path: Path) -> None:
    """Scales of tiles have 16 bits: the reference's are those of the checkpoint."""
    path = make_tiny_llama(tmp_path / "model", **SOURCES[name])
    served = load_model(path, reference_ops())
    expected = PagedRun(served.model).step([(0, TOKENS[0])], every_row=True)
    for _ in range(2):  # the second one comes from the cache
        base = load_base(path, cache_dir=tmp_path / "cache")
        assert base_fingerprint(base) == served.fingerprint
        with torch.no_grad():
            logits = base(input_ids=torch.tensor(TOKENS)).logits[0]
        assert logits.dtype == torch.float32
        assert relative_error(logits, expected) < 5e-5


def test_a_gguf_file_is_a_source(tmp_path: Path) -> None:
    original = make_tiny_llama(tmp_path / "hf")
    base = load_base(write_gguf(tmp_path / "m.gguf", original), cache_dir=tmp_path / "cache")
    assert base_fingerprint(base) == base_fingerprint(load_base(original))
    with torch.no_grad():
        logits = [one(input_ids=torch.tensor(TOKENS)).logits for one in (base, load_base(original))]
    assert torch.equal(*logits)


def test_the_weights_are_the_served_bits(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model")
    ops: Any = load_ops("cpu", device=torch.device("cpu"), dtype=torch.bfloat16)
    served = load_model(path, ops, cache_dir=tmp_path / "cache").model
    base = load_base(path, cache_dir=tmp_path / "cache")
    for name, handle in served.linears.items():
        layer = base.get_submodule(name if name == "lm_head" else f"model.{name}")
        expected = torch.empty(handle.out_features, handle.in_features)
        ops.decode_rows(handle, 0, handle.out_features, expected)
        assert torch.equal(layer.decoded(), expected)
    assert torch.equal(base.model.embed_tokens.weight, served.tensors["embed_tokens.weight"])


def test_the_packed_file_is_mapped_and_training_writes_none_of_its_pages(tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / "model", intermediate_size=192)
    load_base(path, cache_dir=tmp_path / "cache")
    base = load_base(path, cache_dir=tmp_path / "cache")
    model = with_adapter(base)
    loss_of(model, torch.tensor(TOKENS)).backward()
    assert all(p.grad is not None for _, p in adapter_parameters(model))
    maps = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    ours = [entry for entry in maps if str(tmp_path / "cache") in entry.splitlines()[0]]
    assert ours
    for entry in ours:
        fields = dict(re.findall(r"^(\w+): +(\d+) kB", entry, re.MULTILINE))
        assert int(fields["Rss"]) > 0
        assert fields["Anonymous"] == "0", "a page was written and is a copy now"
    ((start, end),) = [[int(number, 16) for number in entry.split()[0].split("-")] for entry in ours]
    packed = [m._served.tensors[0] for name, m in base.named_modules() if name.endswith("_proj.base_layer")]
    assert len(packed) == 2 * 7
    assert all(start <= p.data_ptr() < end for p in packed)


def test_nothing_is_trainable_until_peft_wraps_it_and_then_only_the_adapter(tmp_path: Path) -> None:
    base = load_base(make_tiny_llama(tmp_path))
    assert not any(p.requires_grad for p in base.parameters())
    model = with_adapter(base)
    names = [name for name, _ in adapter_parameters(model)]
    assert names
    assert all("lora_" in name for name in names)
    assert all(p.dtype == torch.float32 for _, p in adapter_parameters(model))
    assert base_fingerprint(model) == base_fingerprint(base)


def test_no_weight_of_a_projection_is_in_the_model_s_parameters(tmp_path: Path) -> None:
    base = load_base(make_tiny_llama(tmp_path))
    embedding, norms = 384 * 64, 5 * 64
    assert sum(p.numel() for p in base.parameters()) == embedding + norms


def test_wrong_sources_and_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_base(tmp_path / "nothing")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        load_base(make_tiny_llama(tmp_path), dtype=torch.float16)
    with pytest.raises(ValueError, match="load_base"):
        base_fingerprint(torch.nn.Linear(1, 1))


def test_a_part_that_the_served_model_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guanaco.server.training.quantized import model as room

    fill = room._fill

    def leave_one_out(model: Any, loaded: Any, *rest: Any) -> None:
        del loaded.model.linears["layers.0.mlp.up_proj"]
        fill(model, loaded, *rest)

    monkeypatch.setattr(room, "_fill", leave_one_out)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight.*cannot be trained"):
        load_base(make_tiny_llama(tmp_path))
