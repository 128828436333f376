"""Loaded adapters against PEFT's own delta weights, what names a version, and tables that PEFT saves along."""

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import BASE_FINGERPRINT_KEY, load_adapter
from support.adapters.edits import WEIGHTS, edit_config, rewrite, without
from support.adapters.tiny_adapters import PROJECTIONS, make_adapter, targets_of, write_adapter
from support.models.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def base():
    return tiny_llama(kind="gqa", num_hidden_layers=3)


@pytest.fixture(scope="module")
def targets(base):
    return targets_of(base)


def peft_adapter(base, path, *, seed=0, dtype=torch.float32, **fields):
    """Let PEFT make, fill and save an adapter; returns its delta weight per target, in float64."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(dtype))
    deltas = {
        name.removeprefix("base_model.model.model."): layer.get_delta_weight("default").double()
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    if dtype != torch.float32:
        model = model.to(dtype)
    model.save_pretrained(path)
    model.unload()
    base.to(torch.float32)
    return deltas


PEFT_CONFIGS = {
    "guanaco": {"r": 64, "lora_alpha": 16, "target_modules": list(PROJECTIONS)},
    "rank_1": {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "rank_128": {"r": 128, "lora_alpha": 32, "target_modules": ["down_proj", "o_proj"]},
    "rank_7_rslora": {"r": 7, "lora_alpha": 8, "use_rslora": True, "target_modules": ["gate_proj", "k_proj"]},
    "all_linear": {"r": 4, "target_modules": "all-linear"},
    "all_linear_but": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj", "v_proj"]},
    "regex": {"r": 4, "target_modules": r".*\.layers\.[02]\..*(q|down)_proj"},
    "layers": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one_layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.2\..*": 5, "model.layers.1.mlp.down_proj": 16, "v_proj": 2},  # as PEFT will sort it
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1.5, "down_proj": 64},
    },
    "patterns_rslora": {
        "r": 9,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 25},
        "alpha_pattern": {".*layers.1.*": 2},
    },
    "orthogonal": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pefts_delta_weights(base, targets, tmp_path, name, dtype):
    deltas = peft_adapter(base, tmp_path, dtype=dtype, **PEFT_CONFIGS[name])
    adapter = load_adapter(tmp_path, targets)
    assert adapter.pairs.keys() == deltas.keys()
    for target, pair in adapter.pairs.items():
        assert pair.a.dtype == pair.b.dtype == dtype
        ours = pair.scale * (pair.b.double() @ pair.a.double())
        torch.testing.assert_close(ours, deltas[target], rtol=1e-5, atol=1e-4)
    assert list(adapter.pairs) == [target for target in targets if target in deltas]
    assert adapter.modules_applied == len(deltas)
    assert adapter.modules_possible == len(targets) == 21
    assert adapter.max_rank == max(pair.a.shape[0] for pair in adapter.pairs.values())
    assert adapter.num_bytes == sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.pairs.values())


def test_adapter_with_a_name_in_pefts_sub_folder(base, targets, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="pirate")
    model.save_pretrained(tmp_path)
    model.unload()
    assert not (tmp_path / "adapter_config.json").exists()
    assert load_adapter(tmp_path, targets, name="pirate").modules_applied == 3
    with pytest.raises(AdapterError) as error:
        load_adapter(tmp_path, targets, name="terse")
    assert error.value.code == "config_missing"


def reorder(path):
    """The same tensors, stored back to front: the library itself always sorts them."""
    content = (path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), b""
    header.pop("__metadata__", None)
    for entry in reversed(header.values()):
        first, last = entry["data_offsets"]
        entry["data_offsets"] = [len(data), len(data) + last - first]
        data += content[start + first : start + last]
    text = json.dumps(header).encode()
    assert data != content[start:]
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_version_names_the_content(targets, tmp_path):
    """Equal wherever the same is computed, another wherever something else is."""
    path = make_adapter(tmp_path / "a", targets, 4, seed=1)
    version = load_adapter(path, targets).version
    assert len(version) == 64
    assert int(version, 16) >= 0

    same = shutil.copytree(path, tmp_path / "same")
    rewrite(same, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    reorder(same)
    edit_config(same, lora_dropout=0.3, base_model_name_or_path="elsewhere", r=8, lora_alpha=999)
    edit_config(same, rank_pattern={"proj": 1, ".*": 4}, alpha_pattern={".*_proj": 16}, revision="x")
    assert load_adapter(same, targets).version == version

    others = {version}
    for index, change in enumerate(
        [
            {"lora_alpha": 17},
            {"use_rslora": True},
            {"alpha_pattern": {"layers.0.mlp.up_proj": 15}},
        ]
    ):
        other = shutil.copytree(path, tmp_path / f"config{index}")
        edit_config(other, **change)
        others.add(load_adapter(other, targets).version)

    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    twin = key.replace("layers.1", "layers.2")
    for index, change in enumerate(
        [
            lambda t: {**t, key: t[key].nextafter(torch.tensor(9.0))},
            lambda t: {**t, key: t[twin], twin: t[key]},
            lambda t: {name: tensor.double().half() for name, tensor in t.items()},
            lambda t: {**t, key: -t[key]},
        ]
    ):
        other = shutil.copytree(path, tmp_path / f"tensors{index}")
        rewrite(other, change)
        others.add(load_adapter(other, targets).version)
    assert len(others) == 8


def test_halves_of_different_types_become_float32(targets, tmp_path):
    path = make_adapter(tmp_path, targets, 4, modules=["q_proj"])
    rewrite(path, lambda t: {k: v.bfloat16() if "lora_A" in k else v for k, v in t.items()})
    pair = load_adapter(path, targets).pairs["layers.0.self_attn.q_proj"]
    assert pair.a.dtype == pair.b.dtype == torch.float32


def test_modules_without_effect_are_left_out_and_noted(targets, tmp_path):
    path = make_adapter(tmp_path, targets, 4, modules=["q_proj"])
    rewrite(path, lambda t: {k: v * 0 if "layers.1" in k and "lora_B" in k else v for k, v in t.items()})
    adapter = load_adapter(path, targets)
    assert list(adapter.pairs) == ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]
    assert adapter.modules_applied == 2
    assert "layers.1.self_attn.q_proj" in adapter.notes[0]


def test_fingerprint_of_the_base_is_read(targets, tmp_path):
    tensors = {"layers.0.mlp.up_proj.lora_A": torch.ones(1, 64), "layers.0.mlp.up_proj.lora_B": torch.ones(160, 1)}
    fields = {"r": 1, "target_modules": ["model.layers.0.mlp.up_proj"]}
    path = write_adapter(tmp_path, tensors, fields, metadata={BASE_FINGERPRINT_KEY: "sha256:abc"})
    assert load_adapter(path, targets).base_fingerprint == "sha256:abc"
    assert load_adapter(write_adapter(tmp_path, tensors, fields), targets).base_fingerprint is None


def test_modules_without_tensors_stay_as_the_base_has_them(base, targets, tmp_path):
    """As PEFT loads it: MLX trains the top layers only, and its config targets the module in every layer."""
    path = make_adapter(tmp_path, targets, 4, modules=["q_proj", "v_proj"])
    edit_config(path, target_modules=["q_proj", "v_proj", "k_proj"])
    rewrite(path, lambda t: {name: tensor for name, tensor in t.items() if "layers.0." not in name})
    adapter = load_adapter(path, targets)
    model = peft.PeftModel.from_pretrained(base, path)
    oracle = {
        name.removeprefix("base_model.model.model."): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    model.unload()
    assert len(oracle) == 9
    assert set(adapter.pairs) == {name for name, delta in oracle.items() if delta.any()}
    assert len(adapter.pairs) == 4
    for name, pair in adapter.pairs.items():
        torch.testing.assert_close(pair.scale * pair.b @ pair.a, oracle[name])
    (note,) = adapter.notes
    assert note.startswith("5 of 9 targeted modules have no tensors")
    assert "layers.0.self_attn.q_proj" in note


class TestSavedTables:
    """PEFT saves embedding and head along where it thinks that the vocabulary may have changed."""

    EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"

    def tables(self, base, dtype=torch.float32):
        weights = {"embed_tokens": base.model.embed_tokens.weight, "lm_head": base.lm_head.weight}
        return {name: weight.detach().to(dtype) for name, weight in weights.items()}

    def saved(self, base, path, dtype=torch.float32):
        """Through PEFT itself."""
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(path, save_embedding_layers=True)
        model.unload()
        rewrite(path, lambda t: {k: v if "lora" in k else v.to(dtype) for k, v in t.items()})
        return path

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equal_ones_are_accepted_with_a_note(self, base, targets, tmp_path, stored, dtype):
        path = self.saved(base, tmp_path, dtype)
        assert {self.EMBEDDING, self.HEAD} < safetensors.torch.load_file(path / WEIGHTS).keys()
        ours = self.tables(base, stored)
        if stored is torch.float16:  # PEFT saved what it had in memory: the base's 16 bits, in its own dtype
            saved = {self.EMBEDDING: ours["embed_tokens"].to(dtype), self.HEAD: ours["lm_head"].to(dtype)}
            rewrite(path, lambda t: {**t, **saved})
        adapter = load_adapter(path, targets, base_table=ours.get)
        (note,) = adapter.notes
        assert "embed_tokens and lm_head" in note or "lm_head and embed_tokens" in note
        rewrite(path, without(self.EMBEDDING, self.HEAD))
        plain = load_adapter(path, targets)
        assert plain.version == adapter.version, "they change nothing"
        assert plain.num_bytes == adapter.num_bytes
        assert plain.notes == ()

    @pytest.mark.parametrize("key", [EMBEDDING, HEAD])
    def test_one_other_value_is_refused(self, base, targets, tmp_path, key):
        path = self.saved(base, tmp_path)
        rewrite(
            path,
            lambda t: {k: v.clone().index_fill_(0, torch.tensor([383]), 1.0) if k == key else v for k, v in t.items()},
        )
        with pytest.raises(AdapterError, match="differs from the base's") as error:
            load_adapter(path, targets, base_table=self.tables(base).get)
        assert error.value.field == key

    def test_a_base_that_cannot_be_read_is_not_taken_for_equal(self, base, targets, tmp_path):
        path = self.saved(base, tmp_path)
        for table in (None, lambda name: None):
            with pytest.raises(AdapterError) as error:
                load_adapter(path, targets, base_table=table)
            assert error.value.code in ("embedding_unsupported", "lm_head_unsupported")
