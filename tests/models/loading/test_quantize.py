"""A quantised checkpoint: the bytes of transformers + bitsandbytes, loadable there, and written whole or not at all."""

import json
import weakref
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from guanaco.kernels.nf4 import Nf4Weight, dtype_name, quantize
from guanaco.kernels.nf4_state import from_state, quantized_names
from guanaco.models.architectures.config_json import parse_config, read_config
from guanaco.models.errors import ModelError
from guanaco.models.loading import checkpoint
from guanaco.models.loading.gguf_checkpoint import gguf_name
from guanaco.models.loading.quantize import (
    dense_tensor,
    is_projection,
    quantize_checkpoint,
    quantize_tensor,
)
from guanaco.models.text.tokenizer import Tokenizer
from support.models.oracles import plain_bitsandbytes
from support.models.tiny_models import KINDS, make_tiny_llama

TOKENS = torch.tensor([[5, 9, 200, 33, 7, 7, 380, 1, 0, 42], [8, 3, 1, 64, 99, 5, 2, 17, 301, 6]])


def read_tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def leftovers(parent: Path, *known: str) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name not in known]


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def write_gguf(path: Path, src: Path) -> Path:
    """The tiny checkpoint at `src` as llama.cpp's converter has it: float32, q and k reordered, tokenizer inside."""
    config = read_config(src)
    tokenizer = json.loads((src / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
    writer.add_token_types([3] * 3 + [1] * (len(ids) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in read_tensors(src).items():
        stored = gguf_name(name.removeprefix("model."))
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(stored.split(".")[-2])
        if heads is not None:
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(stored, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_whole_checkpoint(tmp_path: Path) -> None:
    """The weights of the directory that it was made from, and a tokenizer: what comes out can be served."""
    src = make_tiny_llama(tmp_path / "src")
    quantize_checkpoint(src, tmp_path / "from_directory")
    quantize_checkpoint(write_gguf(tmp_path / "model.gguf", src), tmp_path / "from_gguf")
    theirs = read_tensors(tmp_path / "from_directory")
    ours = read_tensors(tmp_path / "from_gguf")
    for name in quantized_names(theirs):
        assert from_state(ours, name).fingerprint() == from_state(theirs, name).fingerprint()
    assert_same_tensors(
        {n: t for n, t in ours.items() if "quant_state" not in n},  # that says float32 here, bfloat16 there
        {n: t for n, t in theirs.items() if "quant_state" not in n},
    )
    assert Tokenizer.from_directory(tmp_path / "from_gguf").encode("Hello, you") == Tokenizer.from_directory(
        tmp_path / "from_directory"
    ).encode("Hello, you")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["gqa", "odd"])
def test_same_bytes_as_transformers_and_bitsandbytes(tmp_path: Path, kind: str, double: bool) -> None:
    make_tiny_llama(tmp_path / "dense", kind=kind)
    make_tiny_llama(tmp_path / "theirs", kind=kind, quantized="double" if double else "single")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", double_quant=double)
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert_same_tensors(ours, theirs)
    dense = read_tensors(tmp_path / "dense")
    names = quantized_names(theirs)
    assert names == {name for name in dense if is_projection(name, read_config(tmp_path / "dense"))}
    for name in names:
        weight = from_state(theirs, name)
        assert weight.is_double_quantized == double
        assert weight.fingerprint() == quantize(dense[name], double_quant=double).fingerprint()
    config, their_config = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs"))
    ignored = {"bnb_4bit_compute_dtype", "llm_int8_skip_modules"}  # the first is a choice; the second says it openly
    ours_q, theirs_q = (
        {k: v for k, v in c["quantization_config"].items() if k not in ignored} for c in (config, their_config)
    )
    assert ours_q == theirs_q
    assert {
        k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "transformers_version")
    } == {k: v for k, v in their_config.items() if k not in ("quantization_config", "transformers_version")}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in sorted(KINDS)),
        ("odd", torch.bfloat16),
        ("tied", torch.float16),
        ("rows of 96 and 172", torch.float32),
    ],
    ids=str,
)
def test_transformers_computes_the_same(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Loaded there with its quantization_config, and dense with the weights from our decoder: the same logits."""
    from transformers import LlamaForCausalLM

    plain_bitsandbytes()
    sizes: dict[str, Any] = {} if kind in KINDS else {"hidden_size": 96, "intermediate_size": 172}
    src = make_tiny_llama(tmp_path / "src", kind=kind if kind in KINDS else "gqa", dtype=dtype, **sizes)
    dst = tmp_path / "dst"
    quantize_checkpoint(src, dst)
    stored = read_tensors(dst)
    assert {t.dtype for n, t in stored.items() if t.is_floating_point() and "map" not in n and "absmax" not in n} == {
        torch.float16 if dtype == torch.float16 else torch.bfloat16
    }
    quantised: Any = LlamaForCausalLM.from_pretrained(dst)
    for module in quantised.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
    for parameter in quantised.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    state = {}
    for name in read_tensors(src):
        state[name] = (
            from_state(stored, name).dequantize() if is_projection(name, read_config(src)) else stored[name].float()
        )
    dense: Any = LlamaForCausalLM.from_pretrained(src, dtype=torch.float32)
    missing, unexpected = dense.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == ({"lm_head.weight"} if kind == "tied" else set(), [])
    with torch.no_grad():
        expected, logits = dense(TOKENS).logits, quantised(TOKENS).logits
        plain = LlamaForCausalLM.from_pretrained(src, dtype=torch.float32)(TOKENS).logits
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert (plain - expected).norm() > 1e-2 * expected.norm(), "quantised at all?"


def test_shards_in_and_out(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    plain_bitsandbytes()
    whole = make_tiny_llama(tmp_path / "whole")
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    quantize_checkpoint(whole, tmp_path / "one")
    report = quantize_checkpoint(tmp_path / "sharded", tmp_path / "many", max_shard_bytes=50_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert_same_tensors(read_tensors(tmp_path / "many"), read_tensors(tmp_path / "one"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.written_bytes
    for file in files:
        assert set(load_file(file)) == {name for name, home in index["weight_map"].items() if home == file.name}
        assert sum(t.nbytes for t in load_file(file).values()) <= 50_000 or len(quantized_names(load_file(file))) == 0
    one, many = (LlamaForCausalLM.from_pretrained(tmp_path / d) for d in ("one", "many"))
    with torch.no_grad():
        assert torch.equal(one(TOKENS).logits, many(TOKENS).logits)


def test_report_progress_and_companions(tmp_path: Path) -> None:
    src = make_tiny_llama(tmp_path / "src")
    (src / "README.md").write_text("not known")
    (src / "training_args.bin").write_bytes(b"no")
    (src / "LICENSE").write_text("terms")
    calls: list[tuple[str, int, int]] = []
    report = quantize_checkpoint(src, tmp_path / "a" / "b" / "dst", progress=lambda *call: calls.append(call))
    dst = tmp_path / "a" / "b" / "dst"
    tensors = read_tensors(src)
    total = sum(t.nbytes for t in tensors.values())
    assert (report.num_quantized, report.num_dense) == (14, len(tensors) - 14)
    assert report.source_bytes == total
    assert report.written_bytes == sum(t.nbytes for t in read_tensors(dst).values())
    assert report.ignored == ()
    assert len(calls) == len(tensors)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    values = sum(t.numel() for t in tensors.values())
    assert calls[-1][1:] == (values, values)
    assert sorted(p.name for p in dst.iterdir()) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (dst / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    assert dst.stat().st_mode & 0o777 == 0o755
    assert leftovers(dst.parent, "dst") == []


def test_one_source_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is read, no other projection is in memory any more."""
    src = make_tiny_llama(tmp_path / "src")
    alive: list[Any] = []
    read = checkpoint.SafetensorsCheckpoint.matrix

    def watched(self: Any, name: str, shape: tuple[int, int]) -> Nf4Weight | Tensor:
        assert sum(ref() is not None for ref in alive) <= 1, name
        tensor = read(self, name, shape)
        if is_projection(name, self.config):
            alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint.SafetensorsCheckpoint, "matrix", watched)
    quantize_checkpoint(src, tmp_path / "dst")
    assert len(alive) == 14


def test_which_tensors_are_quantised() -> None:
    names = [
        *(f"model.layers.11.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"layers.0.mlp.{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")),
    ]
    config = parse_config({"model_type": "llama"}, "config.json")
    assert all(is_projection(name, config) for name in names)
    others = (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight.absmax",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.q_proj.weight",
        "model.layers.x.mlp.up_proj.weight",
    )
    assert not any(is_projection(name, config) for name in others)


def test_unquantised_tensors_are_16_bit() -> None:
    for dtype, stored in (
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ):
        assert dense_tensor("x", torch.ones(3, dtype=dtype)).dtype == stored
    for bad in (torch.ones(3, dtype=torch.uint8), torch.ones(3, dtype=torch.float8_e4m3fn)):
        with pytest.raises(ModelError, match=f"lm_head: dtype {dtype_name(bad.dtype)} is not supported"):
            dense_tensor("lm_head", bad)
    with pytest.raises(ModelError, match="norm holds values that are not finite"):
        dense_tensor("norm", torch.tensor([1.0, float("inf")]))
    with pytest.raises(ModelError, match=r"up_proj: .*not finite"):
        quantize_tensor("up_proj", torch.full((2, 2), float("nan")))


def damage(src: Path, case: str) -> None:
    file = src / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    match case:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "missing":
            del tensors[name]
            save_file(tensors, file)
        case "shape":
            tensors[name] = tensors[name][:-1].contiguous()
            save_file(tensors, file)
        case "nan":
            tensors[name][3, 5] = float("nan")
            save_file(tensors, file)
        case "nan norm":
            tensors["model.norm.weight"][3] = float("nan")
            save_file(tensors, file)
        case "dtype":
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            save_file(tensors, file)
        case "pickled":
            file.rename(src / "pytorch_model.bin")
        case "no config":
            (src / "config.json").unlink()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "truncated"),
        ("missing", r"up_proj\.weight is missing"),
        ("shape", r"up_proj\.weight has shape"),
        ("nan", r"up_proj\.weight: .*not finite"),
        ("nan norm", r"norm\.weight holds values that are not finite"),
        ("dtype", "float8_e4m3fn"),
        ("pickled", "pickled"),
        ("no config", "config"),
    ],
)
def test_a_bad_source_leaves_nothing(tmp_path: Path, case: str, message: str) -> None:
    src = make_tiny_llama(tmp_path / "src")
    damage(src, case)
    with pytest.raises(ModelError, match=message) as caught:
        quantize_checkpoint(src, tmp_path / "dst")
    assert str(src) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path, "src") == []


def test_refuses_to_overwrite_and_to_quantise_twice(tmp_path: Path) -> None:
    src = make_tiny_llama(tmp_path / "src")
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        quantize_checkpoint(src, tmp_path / "there")
    quantize_checkpoint(src, tmp_path / "dst")
    before = {p.name: p.read_bytes() for p in (tmp_path / "dst").iterdir()}
    with pytest.raises(ModelError, match="exists already"):
        quantize_checkpoint(src, tmp_path / "dst")
    with pytest.raises(ModelError, match="in NF4 already"):
        quantize_checkpoint(tmp_path / "dst", tmp_path / "again")
    with pytest.raises(ModelError, match="does not exist"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "again")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "dst").iterdir()}
    assert leftovers(tmp_path, "src", "dst", "there") == []
