"""Masks in the sampler: every provider draws from a mask alone, and logits stay as they are."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from guanaco.server.engine.constraints import StepMasks, words_of
from guanaco.server.engine.request import SamplingParams
from guanaco.server.engine.sampler import SamplingRow, sample
from support.kernels.providers import PROVIDERS, provider_ops

CPU = torch.device("cpu")


PARAMS = (
    SamplingParams(max_tokens=9, temperature=0.0),
    SamplingParams(max_tokens=9, seed=3),
    SamplingParams(max_tokens=9, seed=3, top_k=7),
    SamplingParams(max_tokens=9, seed=3, top_p=0.8, temperature=0.3),
    SamplingParams(max_tokens=9, seed=3, min_p=0.2, temperature=1.9),
    SamplingParams(max_tokens=9, seed=3, top_k=1000, repetition_penalty=1.8, frequency_penalty=2.0),
    SamplingParams(max_tokens=9, seed=3, logit_bias=((5, 100.0), (70, -100.0))),
)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_provider_draws_from_the_mask_alone(provider: str) -> None:
    """A mask decides what may be drawn, and other rows are untouched; all providers draw the same tokens."""
    ops = provider_ops(provider)
    generator = torch.Generator().manual_seed(4)
    vocab = 77
    logits = torch.randn(2 * len(PARAMS), vocab, generator=generator) * 3
    rows = [SamplingRow(replace(p, seed=i), (1, 2), [3, 4]) for i, p in enumerate((*PARAMS, *PARAMS))]
    masked = tuple(range(0, len(rows), 2))
    words = np.zeros((len(masked), words_of(vocab)), dtype=np.int32)
    allowed = {}
    for place, index in enumerate(masked):
        ids = torch.randperm(vocab, generator=generator)[: 1 + 2 * place].tolist()
        allowed[index] = set(ids)
        flags = np.zeros(words.shape[1] * 32, dtype=np.bool_)
        flags[ids] = True
        words[place] = np.packbits(flags, bitorder="little").view(np.int32)
    found = sample(logits, rows, frozenset(), ops, StepMasks(masked, words, {}))
    plain = sample(logits, rows, frozenset(), ops)
    for index, (token, other) in enumerate(zip(found, plain, strict=True)):
        if index in allowed:
            assert token.token_id in allowed[index]
        else:
            assert token == other
    reference = sample(logits, rows, frozenset(), None, StepMasks(masked, words, {}))
    assert [t.token_id for t in found] == [t.token_id for t in reference]


def test_masks_change_no_logits_and_no_log_probabilities() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    words = np.array([[1 << 7, 0]], dtype=np.int32)
    row = SamplingRow(SamplingParams(max_tokens=1, temperature=0.0, logprobs=1), (), [])
    (token,) = sample(logits, [row], frozenset(), None, StepMasks((0,), words, {}))
    assert torch.equal(logits, before)
    assert token.token_id == 7
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(float(torch.log_softmax(before[0], 0)[7]))
    assert token.logprob.top[0][0] == int(before[0].argmax()), "of the raw logits, as everywhere"


def test_the_highest_bit_of_a_word_is_a_token_too() -> None:
    words = np.array([[np.int32(-(1 << 31)), 0]], dtype=np.int32)
    row = SamplingRow(SamplingParams(max_tokens=5, temperature=0.0, min_tokens=3), (), [])
    (token,) = sample(torch.zeros(1, 33), [row], frozenset({32}), None, StepMasks((0,), words, {}))
    assert token.token_id == 31
    both = np.array([[np.int32(-(1 << 31)), 1]], dtype=np.int32)
    logits = torch.zeros(1, 33)
    logits[0, 32] = 9
    (token,) = sample(logits, [row], frozenset({32}), None, StepMasks((0,), both, {}))
    assert token.token_id == 31, "the end waits for min_tokens"
    (token,) = sample(logits, [row], frozenset({31}), None, StepMasks((0,), both, {}))
    assert token.token_id == 32
