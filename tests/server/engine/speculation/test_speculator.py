"""Prompt lookup over a real small model: the same tokens in fewer steps, and drafts only where they pay."""

from pathlib import Path
from random import Random

import pytest

from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.models.loading.loader import load_model
from guanaco.server.engine.constraints import AllowedTokens
from guanaco.server.engine.request import Request, SamplingParams, Sequence
from guanaco.server.engine.speculation.costs import StepCosts
from guanaco.server.engine.speculation.speculator import MAX_DRAFT_TOKENS, Speculator, Wish
from support.models.oracles import reference_ops
from support.models.tiny_models import make_tiny_llama
from tests.server.engine.speculation.test_same_tokens import Run, Setting, as_clients_see, request

CHEAP_ROWS = StepCosts([(1, 1.0), (100, 1.5)])


def test_lookup_gives_the_same_tokens_in_fewer_steps(tmp_path: Path) -> None:
    """A greedy model that may write three tokens only soon repeats itself: that is foretold."""
    model = load_model(make_tiny_llama(tmp_path / "base", kind="gqa"), reference_ops()).model
    registry = AdapterRegistry(model.lora_targets, base_names=("base",), limits=AdapterLimits(max_rank=64))
    setting = Setting(model, registry)
    few = AllowedTokens.of((40, 41, 42))
    wanted = [request(name, 8 + i, max_tokens=60, allowed=few) for i, name in enumerate("abc")]
    plain = Run(setting)(*wanted)
    run = Run(setting, Speculator(CHEAP_ROWS))(*wanted)
    assert as_clients_see(run) == as_clients_see(plain)
    assert run.num_accepted > 40
    assert run.num_steps < 0.7 * plain.num_steps


def sequence_of(prompt: list[int], output: list[int], number: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=100)
    return Sequence(Request(f"r{number}", tuple(prompt), params), [*prompt, *output], arrival_number=number)


def test_a_copy_is_drafted_deeper_as_it_goes_on() -> None:
    """One stream at the costs of two cores: a copy of 100 tokens, drafted token by token as it comes."""
    text = Random(1).sample(range(1000), 100)
    speculator, depths = Speculator(), []
    for done in range(2, 80):
        (draft,) = speculator.drafts([Wish(sequence_of(text, text[:done]), 50)], 1, 0)
        assert list(draft) == text[done : done + len(draft)]
        depths.append(len(draft))
    assert depths[0] < depths[20] <= depths[60] <= MAX_DRAFT_TOKENS
    assert depths[60] > 6


def test_text_that_is_never_foretold_gets_no_drafts() -> None:
    """Pairs that occur again, each time with another token after them: a few tries, then none."""
    text = [token for i in range(100) for token in (1, 2, 100 + i)]
    speculator, drafted = Speculator(), []
    for done in range(3, 300):
        (draft,) = speculator.drafts([Wish(sequence_of([7], text[:done]), 50)], 1, 0)
        drafted.append(len(draft))
    assert sum(drafted[150:]) == 0
    (draft,) = speculator.drafts([Wish(sequence_of([7], text), 50)], 1, 0)
    assert draft == ()


def test_nothing_is_kept_of_sequences_that_ended() -> None:
    speculator = Speculator()
    one = sequence_of([1, 2, 1, 2], [])
    speculator.drafts([Wish(one, 5)], 1, 0)
    assert speculator.num_records == 1
    speculator.forget(one)
    assert speculator.num_records == 0


@pytest.mark.parametrize("most", [1, 4])
def test_a_draft_is_no_longer_than_its_sequence_may_become(most: int) -> None:
    (draft,) = Speculator(CHEAP_ROWS).drafts([Wish(sequence_of([1, 2] * 20, []), most)], 1, 0)
    assert len(draft) == most
