"""Opening a model: every sentence of what can be wrong with a path, and what variants are the same model."""

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guanaco.kernels.nf4 import Nf4Weight
from guanaco.models.architectures.registry import projection_shapes
from guanaco.models.errors import ModelError
from guanaco.models.loading.checkpoint import INDEX_FILE, open_checkpoint
from support.models.tiny_models import make_tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    make_tiny_llama(root / "dense")
    make_tiny_llama(root / "tied", kind="tied")
    make_tiny_llama(root / "nf4", quantized=True)
    make_tiny_llama(root / "single", quantized="single")
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the one safetensors file of a checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def shard(path: Path, parts: int = 3) -> list[str]:
    """Spread the one file over several, with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    homes = {name: names[i % parts] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, home in homes.items() if home == file}, path / file)
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return names


def read_everything(path: Path) -> dict[str, Tensor]:
    """All weights of the model at `path`, as the model asks for them, decoded."""
    with closing(open_checkpoint(path)) as checkpoint:
        config = checkpoint.config
        table = (config.vocab_size, config.hidden_size)
        tensors: dict[str, Any] = {"embed": checkpoint.tensor("embed_tokens.weight", table)}
        for i in range(config.num_layers):
            for name, shape in projection_shapes(config).items():
                tensors[f"{i}.{name}"] = checkpoint.matrix(f"layers.{i}.{name}.weight", shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{i}.{name}"] = checkpoint.tensor(f"layers.{i}.{name}.weight", (config.hidden_size,))
        tensors["norm"] = checkpoint.tensor("norm.weight", (config.hidden_size,))
        if not config.tie_word_embeddings:
            tensors["head"] = checkpoint.matrix("lm_head.weight", table)
        assert checkpoint.unused() == ()
    return {name: t.dequantize() if isinstance(t, Nf4Weight) else t for name, t in tensors.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("name", ["dense", "nf4"])
def test_sharded_and_single_are_the_same_model(name: str, originals: Path, copy: Callable[[str], Path]) -> None:
    path = copy(name)
    shard(path)
    assert_same(read_everything(path), read_everything(originals / name))


def test_names_with_and_without_prefix_are_the_same_model(originals: Path, copy: Callable[[str], Path]) -> None:
    path = copy("dense")
    tensors = load_file(path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, path / "model.safetensors")
    assert_same(read_everything(path), read_everything(originals / "dense"))


def test_derived_buffers_are_ignored_and_strangers_reported(copy: Callable[[str], Path]) -> None:
    path = copy("dense")
    edit(
        path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "x.y": torch.ones(1)})
    )
    with closing(open_checkpoint(path)) as checkpoint:
        unused = checkpoint.unused()
    assert "x.y" in unused
    assert not any("inv_freq" in name for name in unused)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "F16"), (torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_dense_dtypes_come_out_as_stored(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    path = make_tiny_llama(tmp_path / name, dtype=dtype)
    assert all(tensor.dtype == dtype for tensor in read_everything(path).values())


def test_nf4_stays_packed_whatever_dtype_its_bytes_are_labelled_with(copy: Callable[[str], Path]) -> None:
    path, plain = copy("nf4"), copy("single")
    before = read_everything(path)
    edit(path, lambda t: t.update({Q_PROJ: t[Q_PROJ].view(-1).view(torch.bfloat16).view(-1, 1)}))
    assert_same(read_everything(path), before)
    with closing(open_checkpoint(path)) as double, closing(open_checkpoint(plain)) as single:
        assert double.is_quantized
        weights = [c.matrix("layers.0.self_attn.q_proj.weight", (64, 64)) for c in (double, single)]
    assert [isinstance(w, Nf4Weight) and w.is_double_quantized for w in weights] == [True, False]


class TestTying:
    def test_either_of_the_two_names_will_do(self, originals: Path, copy: Callable[[str], Path]) -> None:
        path = copy("tied")
        edit(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
        assert_same(read_everything(path), read_everything(originals / "tied"))

    def test_both_stored_and_equal_is_tied(self, originals: Path, copy: Callable[[str], Path]) -> None:
        path = copy("tied")
        edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        assert_same(read_everything(path), read_everything(originals / "tied"))

    def test_both_stored_and_different_is_not_tied_as_in_transformers(self, copy: Callable[[str], Path]) -> None:
        from transformers import LlamaForCausalLM

        path = copy("tied")
        edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].flip(0)}))
        oracle = LlamaForCausalLM.from_pretrained(path)
        ours = read_everything(path)
        assert torch.equal(ours["head"], oracle.lm_head.weight)
        assert torch.equal(ours["embed"], oracle.model.embed_tokens.weight)


class TestRefusals:
    """One line each: what is wrong, and what to do."""

    def refused(self, path: Path, *said: str) -> str:
        with pytest.raises(ModelError) as error:
            read_everything(path)
        message = str(error.value)
        assert "\n" not in message
        for part in said:
            assert part in message
        return message

    def test_a_path_that_does_not_exist(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "nowhere does not exist", "org/name")

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        self.refused(tmp_path / "notes.txt", "is no model", "config.json")

    def test_an_empty_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "holds no weights", "safetensors")

    def test_an_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        self.refused(tmp_path, "LoRA adapter", "--adapter NAME=")

    def test_no_config(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        (path / "config.json").unlink()
        self.refused(path, "config.json is missing", "download")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
    def test_only_pickled_weights(self, name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
        path = copy("dense")
        (path / "model.safetensors").unlink()
        canary = tmp_path / "canary"
        bomb = pickle.dumps(Bomb(canary))
        pickle.loads(bomb)  # it does go off when it is opened
        canary.unlink()
        (path / name).write_bytes(bomb)
        self.refused(path, "only pickled weights", "save_pretrained(DST, safe_serialization=True)", "transformers")
        assert not canary.exists()

    def test_a_pickle_beside_safetensors_is_left_alone(self, originals: Path, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        (path / "pytorch_model.bin").write_bytes(b"not even a pickle")
        assert_same(read_everything(path), read_everything(originals / "dense"))

    def test_a_missing_shard(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        name = shard(path)[1]
        (path / name).unlink()
        self.refused(path, f"{name} is missing", "index", "download")

    def test_all_shards_missing(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        for name in shard(path):
            (path / name).unlink()
        self.refused(path, INDEX_FILE, "none of its shards")

    def test_a_truncated_shard(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        name = shard(path)[2]
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1])
        self.refused(path, name, f"truncated: {len(whole) - 1} of {len(whole)} bytes", "download")

    def test_a_shard_that_lacks_what_the_index_promises(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        names = shard(path)
        index = json.loads((path / INDEX_FILE).read_text())
        index["weight_map"][Q_PROJ] = next(n for n in names if n != index["weight_map"][Q_PROJ])
        (path / INDEX_FILE).write_text(json.dumps(index))
        self.refused(path, f"lacks the tensor {Q_PROJ}")

    def test_shards_without_an_index(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        shard(path)
        (path / INDEX_FILE).unlink()
        self.refused(path, "3 safetensors files", INDEX_FILE)

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "{"])
    def test_an_index_that_makes_no_sense(self, content: str, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        shard(path)
        (path / INDEX_FILE).write_text(content)
        self.refused(path, INDEX_FILE, "download")

    def test_an_index_that_points_elsewhere(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        shard(path)
        (path / INDEX_FILE).write_text(json.dumps({"weight_map": {Q_PROJ: "../dense/model.safetensors"}}))
        self.refused(path, "../dense/model.safetensors", "no file of this directory")

    def test_a_missing_tensor(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        edit(path, lambda t: t.pop(Q_PROJ))
        self.refused(path, f"the tensor {Q_PROJ} is missing", "incomplete")

    def test_a_missing_head_tells_of_tying(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        edit(path, lambda t: t.pop("lm_head.weight"))
        self.refused(path, "lm_head.weight is missing", "tie_word_embeddings = true")

    def test_a_wrong_shape(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        edit(path, lambda t: t.update({Q_PROJ: t[Q_PROJ][:60].clone()}))
        self.refused(path, Q_PROJ, "[60, 64]", "[64, 64]", "config")

    def test_a_wrong_shape_of_a_quantised_weight(self, copy: Callable[[str], Path]) -> None:
        path = copy("nf4")
        edit_config(path, intermediate_size=320)
        self.refused(path, "[160, 64]", "[320, 64]", "config")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
    def test_an_unexpected_dtype(self, dtype: torch.dtype, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        edit(path, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(dtype)}))
        self.refused(path, Q_PROJ, str(dtype).removeprefix("torch."), "fp16, bf16, fp32")

    def test_a_quantised_embedding(self, copy: Callable[[str], Path]) -> None:
        path = copy("nf4")
        rename = {".quant_state.bitsandbytes__nf4", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ""}
        edit(
            path,
            lambda t: t.update({f"model.embed_tokens.weight{s}": t[Q_PROJ + s].clone() for s in rename}),
        )
        self.refused(path, "embed_tokens.weight", "4 bit")

    @pytest.mark.parametrize("part", [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
    def test_a_quantised_weight_that_lost_a_part(self, part: str, copy: Callable[[str], Path]) -> None:
        path = copy("nf4")
        edit(path, lambda t: t.pop(Q_PROJ + part))
        self.refused(path, Q_PROJ + part, "missing")

    def test_another_quantisation_in_the_config(self, copy: Callable[[str], Path]) -> None:
        path = copy("dense")
        edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
        self.refused(path, "quantization_config.quant_method = 'gptq'")

    def test_a_directory_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(_: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", denied)  # chmod would not stop root
        self.refused(tmp_path, "Permission denied", "permissions")

    def test_several_ggufs(self, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        self.refused(tmp_path, "several GGUF files", "a.gguf")
