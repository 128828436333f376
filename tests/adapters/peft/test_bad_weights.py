"""Adapters that are refused: by their tensors, by their config, or because they are not whole."""

import shlex
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import AdapterLimits, load_adapter
from support.adapters.edits import WEIGHTS, edit_config, rewrite, without
from support.adapters.tiny_adapters import make_adapter, targets_of
from support.models.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def targets():
    return targets_of(tiny_llama(kind="gqa", num_hidden_layers=3))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
A, B = Q.format("A"), Q.format("B")


def renamed(old, new):
    return lambda t: {name.replace(old, new): tensor for name, tensor in t.items()}


def added(name, *shape):
    return lambda t: {**t, name: torch.ones(*shape)}


def replaced(name, tensor):
    return lambda t: {**t, name: tensor}


def scaled(part, factor):
    return lambda t: {name: tensor * factor if part in name else tensor for name, tensor in t.items()}


def transposed(t):
    return {name: tensor.T.contiguous() for name, tensor in t.items()}


BAD_TENSORS = {
    "nan": ("not_finite", replaced(A, torch.full((4, 64), float("nan")))),
    "one_nan": ("not_finite", lambda t: {**t, B: t[B].index_fill(0, torch.tensor([63]), float("nan"))}),
    "infinity": ("not_finite", replaced(B, torch.full((64, 4), float("inf")))),
    "negative_infinity": ("not_finite", replaced(B, torch.full((64, 4), float("-inf")))),
    "half_overflow": ("not_finite", replaced(A, torch.full((4, 64), 1e6).half())),
    "all_b_zero": ("zero_effect", scaled("lora_B", 0)),
    "all_a_zero": ("zero_effect", scaled("lora_A", 0)),
    "all_negative_zero": ("zero_effect", scaled("lora_B", -0.0)),
    "a_missing": ("missing_tensor", without(A)),
    "b_missing": ("missing_tensor", without(B)),
    "rank_of_a_differs": ("rank_mismatch", replaced(A, torch.ones(5, 64))),
    "rank_of_b_differs": ("rank_mismatch", replaced(B, torch.ones(64, 3))),
    "both_ranks_differ": ("rank_mismatch", lambda t: {**t, A: torch.ones(8, 64), B: torch.ones(64, 8)}),
    "rank_too_large": ("rank_too_large", lambda t: {**t, A: torch.ones(300, 64), B: torch.ones(64, 300)}),
    "a_of_another_base": ("shape_mismatch", replaced(A, torch.ones(4, 128))),
    "b_of_another_base": ("shape_mismatch", replaced(B, torch.ones(128, 4))),
    "gqa_b_where_mha_was": ("shape_mismatch", replaced(B.replace("q_proj", "v_proj"), torch.ones(64, 4))),
    "transposed": ("shape_mismatch", transposed),
    "vector": ("bad_shape", replaced(A, torch.ones(256))),
    "three_dimensions": ("bad_shape", replaced(A, torch.ones(1, 4, 64))),
    "scalar": ("bad_shape", replaced(A, torch.tensor(1.0))),
    "swapped_halves": ("shape_mismatch", lambda t: {**t, A: t[B], B: t[A]}),
    "double": ("dtype_unsupported", replaced(A, torch.ones(4, 64).double())),
    "integers": ("dtype_unsupported", replaced(A, torch.ones(4, 64).to(torch.int8))),
    "empty_tensor": ("empty_tensor", replaced(A, torch.ones(0, 64))),
    "layer_out_of_range": ("layer_out_of_range", renamed("layers.2.", "layers.3.")),
    "layer_far_out": ("layer_out_of_range", renamed("layers.2.", "layers.99999.")),
    "layer_negative": ("unexpected_tensor", renamed("layers.2.", "layers.-1.")),
    "layer_spelt_oddly": ("unexpected_tensor", renamed("layers.2.", "layers.02.")),
    "module_unknown": ("unexpected_tensor", renamed("q_proj", "Wqkv")),
    "gpt_module": ("unexpected_tensor", renamed("layers.0.self_attn", "h.0.attn")),
    "module_untargeted": ("untargeted_tensor", renamed("q_proj", "k_proj")),
    "two_spellings": ("duplicate_tensor", lambda t: {**t, A.replace(".weight", ".default.weight"): t[A].clone()}),
    "two_adapters": (
        "several_adapters",
        lambda t: {k.replace(".weight", ".b.weight" if "layers.1" in k else ".a.weight"): v for k, v in t.items()},
    ),
    "no_prefix": ("unexpected_tensor", renamed("base_model.model.", "")),
    "kohya_names": ("unexpected_tensor", renamed("base_model.model.model.", "lora_unet_")),
    "no_suffix": ("unexpected_tensor", renamed(".weight", "")),
    "without_model": ("unexpected_tensor", renamed("base_model.model.model.", "base_model.model.")),
    "third_matrix": ("unexpected_tensor", added(A.replace("lora_A", "lora_C"), 4, 64)),
    "path_as_name": ("unexpected_tensor", added("../../etc/passwd", 1)),
    "terminal_codes_as_name": ("unexpected_tensor", added("\x1b[2J\n\x00", 1)),
    "long_name": ("unexpected_tensor", added("x" * 5000, 1)),
    "base_weights": ("unexpected_tensor", added(A.replace("lora_A.", ""), 64, 64)),
    "lora_bias": ("lora_bias_unsupported", added(B.replace("weight", "bias"), 64)),
    "dora": ("dora_unsupported", added(A.replace("lora_A.weight", "lora_magnitude_vector"), 64)),
    "dora_new_name": ("dora_unsupported", added(A.replace("lora_A", "lora_magnitude_vector"), 64)),
    "embedding_lora": ("embedding_unsupported", added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 384)),
    "vocabulary_32001": ("embedding_unsupported", added("base_model.model.model.embed_tokens.weight", 385, 64)),
    "saved_head": ("lm_head_unsupported", added("base_model.model.lm_head.weight", 385, 64)),
    "head_lora": ("lm_head_unsupported", added("base_model.model.lm_head.lora_A.weight", 4, 64)),
    "saved_module": ("modules_to_save_unsupported", added("base_model.model.lm_head.modules_to_save.weight", 385, 64)),
    "trained_tokens": (
        "trainable_tokens_unsupported",
        added("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 64),
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(targets, tmp_path, name):
    code, change = BAD_TENSORS[name]
    path = make_adapter(tmp_path, targets, 4, modules=["q_proj", "v_proj"])
    load_adapter(path, targets)
    rewrite(path, change)
    with pytest.raises(AdapterError) as error:
        load_adapter(path, targets)
    assert error.value.code == code
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
    if code != "zero_effect":
        assert error.value.field
        assert error.value.field in str(error.value)


BAD_CONFIGS = {
    "alpha_zero": ("zero_effect", {"lora_alpha": 0}),
    "rank_in_config_differs": ("rank_mismatch", {"r": 8}),
    "rank_pattern_differs": ("rank_mismatch", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "targets_less": ("untargeted_tensor", {"target_modules": ["q_proj"]}),
    "targets_nothing_here": ("no_targets", {"target_modules": ["Wqkv"]}),
    "layers_less": ("untargeted_tensor", {"layers_to_transform": [0]}),
    "layers_elsewhere": ("no_targets", {"layers_to_transform": [77]}),
    "excluded": ("untargeted_tensor", {"exclude_modules": ["v_proj"]}),
    "dora": ("dora_unsupported", {"use_dora": True}),
    "modules_to_save": ("modules_to_save_unsupported", {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_contradict_the_tensors(targets, tmp_path, name):
    code, fields = BAD_CONFIGS[name]
    path = make_adapter(tmp_path, targets, 4, modules=["q_proj", "v_proj"])
    edit_config(path, **fields)
    with pytest.raises(AdapterError) as error:
        load_adapter(path, targets)
    assert error.value.code == code


def test_rank_limit_names_its_flag(targets, tmp_path):
    path = make_adapter(tmp_path, targets, 64)
    assert load_adapter(path, targets, limits=AdapterLimits(max_rank=64)).max_rank == 64
    with pytest.raises(AdapterError, match="--max-lora-rank") as error:
        load_adapter(path, targets, limits=AdapterLimits(max_rank=63))
    assert error.value.code == "rank_too_large"


def test_nothing_is_allocated_for_a_refused_adapter(targets, tmp_path, monkeypatch):
    """Shapes, ranks and names are decided from the header: no tensor is read before."""
    path = make_adapter(tmp_path, targets, 4)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("memory was taken"))
    for fields in ({"r": 5}, {"target_modules": ["q_proj"]}):
        edit_config(path, **fields)
        with pytest.raises(AdapterError):
            load_adapter(path, targets)


def test_unfinished_directories(targets, tmp_path):
    path = make_adapter(tmp_path, targets, 4)
    (path / WEIGHTS).rename(path / "adapter_model.safetensors.part")
    with pytest.raises(AdapterError) as error:
        load_adapter(path, targets)
    assert error.value.code == "weights_missing"
    (path / "adapter_config.json").write_bytes(b'{"x": "' + b" " * 70_000 + b'"}')
    with pytest.raises(AdapterError) as error:
        load_adapter(path, targets)
    assert error.value.code == "file_too_large"


def test_a_sharded_adapter_is_refused_with_the_line_that_joins_it(targets, tmp_path):
    path = make_adapter(tmp_path, targets, 4)
    whole = load_adapter(path, targets).version
    tensors = sorted(safetensors.torch.load_file(path / WEIGHTS).items())
    (path / WEIGHTS).unlink()
    for number, part in enumerate((tensors[:9], tensors[9:]), start=1):
        safetensors.torch.save_file(dict(part), path / f"adapter_model-{number:05d}-of-00002.safetensors")
    (path / "adapter_model.safetensors.index.json").write_text("{}")
    with pytest.raises(AdapterError, match="2 files") as error:
        load_adapter(path, targets)
    assert error.value.code == "weights_sharded"
    line = shlex.split(str(error.value).partition("with: ")[2])
    subprocess.run([sys.executable, *line[1:]], cwd=path, check=True)
    assert load_adapter(path, targets).version == whole


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_git_lfs_pointer_is_called_so(targets, tmp_path, name):
    path = make_adapter(tmp_path, targets, 4)
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n")
    with pytest.raises(AdapterError, match="git lfs pull") as error:
        load_adapter(path, targets)
    assert (error.value.code, error.value.field) == ("lfs_pointer", name)
