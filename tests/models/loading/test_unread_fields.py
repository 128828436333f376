"""What a model's configs ask for and is not done here is told; what asks for nothing is not."""

from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig

from guanaco.models.loading.unread_fields import _SAMPLING, config_notes, generation_notes
from guanaco.server.api.generation.sampling import SamplingDefaults


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 5),
        ("temperature", "0.7"),
        ("top_p", 0),
        ("top_k", 2.5),
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("typical_p", 0.9),
        ("suppress_tokens", [1]),
        ("max_new_tokens", 100),
        ("made_up", 1),
    ],
)
def test_what_is_not_done_is_told(field: str, value: Any) -> None:
    (note,) = generation_notes({"temperature": 0.7, field: value})
    assert f"{field} = {value!r}" in note


def test_what_asks_for_nothing_is_not_told() -> None:
    config = GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True, eos_token_id=[1, 2]).to_dict()
    assert generation_notes(config) == ()
    assert generation_notes({"num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "top_k": 50}) == ()
    assert config_notes(LlamaConfig().to_dict()) == ()


def test_ranges_are_those_of_the_defaults() -> None:
    """A value is told exactly where the API's defaults leave it out."""
    for name, (least, most) in _SAMPLING.items():
        for value in (least, most, least - 1, most + 1):
            taken = SamplingDefaults.from_generation_config({name: value}) != SamplingDefaults() or value in (
                getattr(SamplingDefaults(), name),
            )
            assert (generation_notes({name: value}) == ()) == (taken and least <= value <= most), (name, value)


def test_unknown_fields_of_a_config_are_told() -> None:
    (note,) = config_notes({"hidden_size": 64, "scale_emb": 12, "rope_interleaved": True, "unknown_flag": False})
    assert note.endswith("scale_emb, rope_interleaved")
