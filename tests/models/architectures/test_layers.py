"""Rotary frequencies, bit for bit those of transformers."""

from typing import Any

import pytest
import torch

from guanaco.models.architectures.config_json import parse_config
from guanaco.models.architectures.layers import Rotary, rope_frequencies
from support.models.tiny_models import KINDS

LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        LLAMA_3_1,
        KINDS["llama3_rope"]["rope_parameters"],
    ],
    ids=["default", "base", "linear", "llama3", "tiny-llama3"],
)
def test_frequencies_and_angles_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "max_position_embeddings": 131072}
    oracle = LlamaRotaryEmbedding(LlamaConfig(**fields, rope_parameters=dict(rope)))
    config = parse_config({**fields, "rope_parameters": rope}, "config.json")
    assert torch.equal(rope_frequencies(config), oracle.inv_freq)

    positions = torch.tensor([0, 1, 2, 77, 8191, 8192, 131071])
    cos, sin = Rotary(config, torch.device("cpu"))(positions)
    oracle_cos, oracle_sin = oracle(torch.zeros(1), positions[None])
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (7, head_dim // 2)
    assert torch.equal(torch.cat((cos, cos), -1), oracle_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), oracle_sin[0])


def test_llama3_scaling_of_the_tiny_model_has_all_three_ranges() -> None:
    """The tiny model's proof would be hollow if its scaling left every frequency alone."""
    fields = {"hidden_size": 64, "num_attention_heads": 4, "rope_parameters": KINDS["llama3_rope"]["rope_parameters"]}
    scaled = rope_frequencies(parse_config(fields, ""))
    plain = rope_frequencies(parse_config({**fields, "rope_parameters": None}, ""))
    ratio = plain / scaled
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert ((ratio > 1.01) & (ratio < 7.99)).any()
