"""Text that a grammar forces is drafted, and masks of a whole draft are those that one token after another gets."""

from collections.abc import Iterator

import numpy as np
import pytest

from guanaco.server.engine.request import Request, SamplingParams, Sequence
from guanaco.server.engine.speculation.costs import StepCosts
from guanaco.server.engine.speculation.speculator import Speculator, Wish
from guanaco.server.grammars.compiler import GrammarCompiler
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.spec import control_token, grammar_of_parts, in_order, json_schema, regex, schema
from guanaco.server.grammars.vocabulary import Vocabulary
from support.grammars.drawing import CONTROL, END, NEVER, NUM_IDS, allowed, small_vocabulary, token_bytes

VOCABULARY = small_vocabulary()
SCHEMA = {
    "type": "object",
    "properties": {"customer": {"type": "boolean"}, "amount": {"enum": [1, 2]}},
    "required": ["customer", "amount"],
}
CHEAP_ROWS = StepCosts([(1, 1.0), (100, 1.5)])


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: VOCABULARY)
    yield made
    made.close()


def encode(text: str) -> list[int]:
    """The longest token first, as far as they go."""
    ids, data = [], text.encode()
    by_bytes = {token: index for index, token in enumerate(VOCABULARY.tokens) if token}
    while data:
        length = max(n for n in range(1, len(data) + 1) if data[:n] in by_bytes)
        ids.append(by_bytes[data[:length]])
        data = data[length:]
    return ids


def words(rows: int) -> np.ndarray:
    return np.zeros((rows, VOCABULARY.num_words), dtype=np.int32)


def matcher_of(compiler: GrammarCompiler) -> GrammarMatcher:
    return compiler.compile(json_schema(SCHEMA, compact=True)).matcher((END,))


def test_masks_ahead_are_those_that_come(compiler: GrammarCompiler) -> None:
    """Token by token and all at once, for a right draft, a wrong one and one across the end."""
    answer = encode('{"customer":true,"amount":2}')
    one_by_one, rows = matcher_of(compiler), words(len(answer))
    for token, row in zip(answer, rows, strict=True):
        one_by_one.fill(row)
        one_by_one.accept(token)
    assert one_by_one.is_complete
    ahead, found = matcher_of(compiler), words(len(answer) + 1)
    ahead.fill_ahead(answer, found)
    assert (found[:-1] == rows).all()
    assert (found[-1] == -1).all(), "nothing follows the end: the row's token is not used"
    cut = words(len(answer) + 1)
    wrong = [*answer[:3], END, *answer[4:]]
    ahead.fill_ahead(wrong, cut)
    assert (cut[:4] == rows[:4]).all()
    assert (cut[4:] == -1).all()
    assert ahead.num_allowed(wrong) == 3
    assert ahead.num_allowed(answer) == len(answer)
    for token in answer:
        ahead.accept(token)
    assert ahead.is_complete, "the place in the text stayed"


def test_forced_text_is_drafted_as_the_tokenizer_divides_it(compiler: GrammarCompiler) -> None:
    """Written with drafts: the keys come as drafts, the values do not."""
    answer, constraint = encode('{"customer":false,"amount":1}'), matcher_of(compiler)
    speculator = Speculator(CHEAP_ROWS, encode)
    request = Request("r", (1,), SamplingParams(max_tokens=100, temperature=0.0), constraint=constraint)
    sequence, steps = Sequence(request, [1]), []
    while not constraint.is_complete:
        done = sequence.num_output_tokens
        (draft,) = speculator.drafts([Wish(sequence, 15)], 1, 0)
        num_right = next((i for i, t in enumerate(draft) if t != answer[done + i]), len(draft))
        steps.append(num_right)
        for token in answer[done : done + num_right + 1]:
            sequence.token_ids.append(token)
            constraint.accept(token)
    assert steps[0] >= len(encode('{"customer":')) - 1
    assert len(steps) < len(answer) / 2


def test_what_a_model_never_writes_is_soon_not_drafted(compiler: GrammarCompiler) -> None:
    """A model that divides a forced text otherwise, each time: the drafts end, and no step is lost for long."""
    constraint = compiler.compile(regex("(abcdef;[0-9])*")).matcher((END,))
    speculator = Speculator(StepCosts([(1, 1.0), (2, 1.3), (16, 6.0)]), lambda text: encode(text)[::-1])
    request = Request("r", (1,), SamplingParams(max_tokens=1000), constraint=constraint)
    sequence, drafted = Sequence(request, [1]), []
    for number in range(60):
        for token in encode(f"abcdef;{number % 10}"):
            (draft,) = speculator.drafts([Wish(sequence, 15)], 1, 0)
            drafted.append(len(draft) if draft[:1] != (token,) else 0)
            sequence.token_ids.append(token)
            constraint.accept(token)
    assert sum(drafted[len(drafted) // 2 :]) == 0


def test_without_a_tokenizer_nothing_is_forced(compiler: GrammarCompiler) -> None:
    request = Request("r", (1,), SamplingParams(max_tokens=100), constraint=matcher_of(compiler))
    assert Speculator(CHEAP_ROWS).drafts([Wish(Sequence(request, [1]), 15)], 1, 0) == [()]


def test_only_the_beginning_of_a_long_forced_text_is_divided(compiler: GrammarCompiler) -> None:
    """A client may force a text of any length: no step reads all of it."""
    lengths: list[int] = []

    def counted(text: str) -> list[int]:
        lengths.append(len(text))
        return encode(text)

    constraint = compiler.compile(json_schema({"const": "ab" * 2000}, compact=True)).matcher((END,))
    request = Request("r", (1,), SamplingParams(max_tokens=100), constraint=constraint)
    (draft,) = Speculator(CHEAP_ROWS, counted).drafts([Wish(Sequence(request, [1]), 15)], 1, 0)
    assert list(draft) == encode('"' + "ab" * 2000)[:15]
    assert max(lengths) <= 256


def test_asking_for_forced_text_changes_no_mask() -> None:
    """Control tokens of a call are forced, too: the matcher must still let them through."""
    marked = Vocabulary.of(token_bytes, NUM_IDS, NEVER, marks=(CONTROL,))
    own = GrammarCompiler(lambda: marked)
    grammar = grammar_of_parts(in_order(control_token(CONTROL), schema(SCHEMA, compact=True), control_token(CONTROL)))
    try:
        compiled = own.compile(grammar)
        for answer in ('{"customer":true,"amount":2}', '{"customer":false,"amount":1}'):
            plain, asked = compiled.matcher((END,)), compiled.matcher((END,))
            for token in (CONTROL, *encode(answer), CONTROL):
                asked.forced()
                assert allowed(asked) == allowed(plain)
                assert asked.error is None
                plain.accept(token)
                asked.accept(token)
            assert asked.is_complete
    finally:
        own.close()


def test_forced_text_goes_on_behind_the_tokens_that_came(compiler: GrammarCompiler) -> None:
    constraint, answer = matcher_of(compiler), '{"customer":true,"amount":2}'
    written = b""
    for token in encode(answer):
        fresh = matcher_of(compiler)
        for before in encode(written.decode()):
            fresh.accept(before)
        assert constraint.forced() == fresh.forced()
        constraint.accept(token)
        written += VOCABULARY.tokens[token]
