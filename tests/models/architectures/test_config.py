"""config.json: the same reading as transformers', both spellings, and refusals that name the field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guanaco.models.architectures.config import LinearRope, Llama3Rope, ModelConfig
from guanaco.models.architectures.config_json import parse_config, read_config
from guanaco.models.errors import ModelError

# The fields that the published checkpoints have, shortened to what is read. LLaMA 1: huggyllama/llama-7b.
LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 32000,
}
# The oldest conversions spell the class otherwise and contradict the tokenizer about bos and eos.
OLDEST = {**LLAMA_1, "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
LLAMA_3_2_1B = {
    **LLAMA_1,
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def parse(**fields: Any) -> ModelConfig:
    return parse_config({**LLAMA_1, **fields}, "config.json")


def same_as_transformers(fields: dict[str, Any]) -> None:
    """Every field that both have agrees."""
    from transformers import LlamaConfig as Oracle

    ours, oracle = parse_config(fields, "config.json"), Oracle(**json.loads(json.dumps(fields)))
    pairs = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "intermediate_size": ours.intermediate_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "head_dim": ours.head_dim,
        "rms_norm_eps": ours.rms_norm_eps,
        "max_position_embeddings": ours.max_position_embeddings,
        "tie_word_embeddings": ours.tie_word_embeddings,
        "attention_bias": ours.attention_bias,
        "mlp_bias": ours.mlp_bias,
        "bos_token_id": ours.bos_token_id,
    }
    assert {name: getattr(oracle, name) for name in pairs} == pairs
    eos = oracle.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    oracle.standardize_rope_params()  # as its rotary embedding does before it reads them
    rope = oracle.rope_parameters
    assert rope["rope_theta"] == ours.rope_theta
    kinds = {"default": type(None), "linear": LinearRope, "llama3": Llama3Rope}
    assert isinstance(ours.rope_scaling, kinds[rope["rope_type"]])
    for name, value in vars(ours.rope_scaling).items() if ours.rope_scaling else ():
        assert rope[name] == value


@pytest.mark.parametrize("fields", [LLAMA_1, OLDEST, LLAMA_3_2_1B, {"model_type": "llama"}], ids=lambda f: str(len(f)))
def test_published_configs_and_defaults_are_read_as_transformers_reads_them(fields: dict[str, Any]) -> None:
    same_as_transformers(fields)


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, LinearRope(4.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5}, 5e5, LinearRope(4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}, 5e5, LinearRope(4.0)),
        ({"rope_scaling": {"rope_type": "llama3", **_LLAMA3}}, 1e4, Llama3Rope(8.0, 1.0, 4.0, 64)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 3.0, **_LLAMA3}},
            3.0,
            Llama3Rope(8.0, 1.0, 4.0, 64),
        ),
        (  # transformers gives the field beside the dictionary priority (Phi-3 writes it so)
            {"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
            1e4,
            Llama3Rope(8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_both_spellings_of_the_rope_fields(fields: dict[str, Any], theta: float, scaling: object) -> None:
    config = parse(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    same_as_transformers({**LLAMA_1, **fields})


@given(
    heads=st.integers(1, 8),
    group=st.integers(1, 4),
    half_head=st.integers(2, 16),
    explicit_head_dim=st.booleans(),
    explicit_kv=st.booleans(),
    theta=st.floats(1.0, 1e6),
    spelling=st.sampled_from(["old", "new"]),
    kind=st.sampled_from(["default", "linear", "llama3"]),
    factor=st.floats(1.0, 64.0),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    eos=st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)),
)
def test_any_config_is_read_as_transformers_reads_it(
    heads: int,
    group: int,
    half_head: int,
    explicit_head_dim: bool,
    explicit_kv: bool,
    theta: float,
    spelling: str,
    kind: str,
    factor: float,
    flags: tuple[bool, bool, bool],
    eos: Any,
) -> None:
    num_heads = heads * group
    fields: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": num_heads * half_head * 2,
        "num_attention_heads": num_heads,
        "eos_token_id": eos,
        **dict(zip(("attention_bias", "mlp_bias", "tie_word_embeddings"), flags, strict=True)),
    }
    if explicit_head_dim:
        fields["head_dim"] = half_head * 2
    if explicit_kv:
        fields["num_key_value_heads"] = heads
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = factor
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    fields |= (
        {"rope_theta": theta, "rope_scaling": rope}
        if spelling == "old"
        else {"rope_parameters": {**rope, "rope_theta": theta}}
    )
    same_as_transformers(fields)
    ours = parse_config(fields, "config.json")
    assert parse_config(json.loads(json.dumps(ours.to_json())), "again") == ours


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "gemma2", "'llama', 'mistral'"),
        ("model_type", "mistral", "only MistralForCausalLM"),
        ("model_type", ["llama"], "only 'llama'"),
        ("architectures", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        ("hidden_act", "gelu", "silu"),
        ("sliding_window", 4096, "not supported"),
        ("layer_types", ["sliding_attention"], "full_attention"),
        ("partial_rotary_factor", 0.5, "not supported"),
        ("num_local_experts", 8, "not supported"),
        ("attn_logit_softcapping", 50.0, "not supported"),
        ("embedding_multiplier", 12.0, "not supported"),
        ("clip_qkv", 8.0, "not supported"),
        ("qk_norm", True, "not supported"),
        ("hidden_size", 0, "at least 1"),
        ("hidden_size", 4097, "multiple of num_attention_heads"),
        ("hidden_size", "4096", "whole number"),
        ("num_hidden_layers", True, "whole number"),
        ("num_key_value_heads", 5, "does not divide"),
        ("head_dim", 127, "even"),
        ("rms_norm_eps", float("nan"), "above 0"),
        ("rms_norm_eps", -1e-6, "above 0"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("eos_token_id", "</s>", "token id"),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "cut into steps"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "'yarn'"),
        ("rope_parameters", {"rope_type": "longrope"}, "'longrope'"),
        ("rope_scaling", {"type": "linear"}, "factor"),
        ("rope_scaling", {"type": "linear", "factor": 0}, "factor"),
        ("rope_scaling", {"rope_type": "llama3", **_LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        ("rope_scaling", {"rope_type": "llama3", **_LLAMA3, "low_freq_factor": None}, "low_freq_factor"),
        ("rope_scaling", {"rope_type": "llama3", **_LLAMA3, "original_max_position_embeddings": 0.5}, "original_max"),
        ("rope_scaling", {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "one rotary embedding"),
        ("rope_scaling", "linear", "object"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_8bit"),
        ("quantization_config", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "'fp4'"),
        ("quantization_config", [], "object"),
    ],
)
def test_what_cannot_run_is_refused_by_the_name_of_its_field(field: str, value: Any, said: str) -> None:
    with pytest.raises(ModelError) as refusal:
        parse(**{field: value})
    message = str(refusal.value)
    assert message.startswith("config.json: ")
    assert field in message
    assert said in message
    assert "\n" not in message


def test_harmless_and_neutral_fields_are_ignored() -> None:
    config = parse(sliding_window=None, num_experts=0, partial_rotary_factor=1.0, pretraining_tp=2, whatever={"a": 1})
    assert config == parse()


def test_ids_of_minus_one_mean_none() -> None:
    config = parse(bos_token_id=-1, eos_token_id=[-1, 2])
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2,))


def test_the_fields_that_change_the_computation_are_those_that_change_logits() -> None:
    base = parse().computation()
    for same in ({"bos_token_id": 5}, {"eos_token_id": [7]}, {"max_position_embeddings": 4096}, {"use_cache": False}):
        assert parse(**same).computation() == base
    linear, llama3 = {"type": "linear", "factor": 8.0}, {"rope_type": "llama3", **_LLAMA3}
    changed = [{"rms_norm_eps": 1e-5}, {"rope_theta": 5e5}, {"rope_scaling": linear}, {"rope_scaling": llama3}]
    seen = [parse(**fields).computation() for fields in changed]
    assert all(seen[i] != other for i in range(len(seen)) for other in (base, *seen[:i]))


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000, b"\xff\xfe"])
def test_a_config_that_is_absent_or_no_json_object(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=r"config\.json .*download"):
        read_config(tmp_path)
