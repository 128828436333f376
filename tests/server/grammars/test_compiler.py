"""Compiling: what is too much is refused in a process of its own, what was compiled is kept, and matchers are apart."""

import contextlib
import gc
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from guanaco.models.error_codes import ErrorCode
from guanaco.models.formats.restricted_process import ProcessEnded
from guanaco.server.grammars import building
from guanaco.server.grammars import compiler as compiler_module
from guanaco.server.grammars.building import build, lark_of
from guanaco.server.grammars.compiler import GrammarCompiler, GrammarLimits
from guanaco.server.grammars.errors import GrammarError, GrammarUnavailable
from guanaco.server.grammars.matcher import GrammarMatcher
from guanaco.server.grammars.spec import Grammar, choice, json_object, json_schema, regex, written
from guanaco.server.grammars.vocabulary import Vocabulary
from support.grammars.drawing import CONTROL, END, NUM_IDS, OTHER_END, PADDING, allowed, draw_text, small_vocabulary

VOCABULARY = small_vocabulary()


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(lambda: VOCABULARY)
    yield made
    made.close()


def chain(length: int) -> dict[str, Any]:
    """Each definition needs the next one."""
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 1} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"const": 1}}}


def rules(count: int) -> str:
    """Each rule needs the next one: llguidance's stack overflows on them."""
    lines = [f'r{i}: "a" r{i + 1} | "b" r{i + 1}' for i in range(count)]
    return "\n".join(["start: r0", *lines, f'r{count}: "x"'])


HOSTILE: dict[str, tuple[Grammar, str]] = {
    "deep references": (json_schema(chain(3000)), "too large"),
    "huge enum": (json_schema({"enum": [f"value {i}" for i in range(50_000)]}), "larger than"),
    "many properties": (
        json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}),
        "too large|took more",
    ),
    "many optional properties": (
        json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
        "too large",
    ),
    "product of unions": (
        json_schema({"allOf": [{"anyOf": [{"pattern": f"a{{{j}}}"} for j in range(10)]} for _ in range(8)]}),
        "too large",
    ),
    "reference to itself": (json_schema({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}), "no text"),
    "multiple of a large number": (json_schema({"type": "integer", "multipleOf": 10**9 + 7}), "too large"),
    "deep regex": (regex("(" * 5000 + "a" + ")" * 5000), "too large"),
    "deep grammar": (written("start: " + "(" * 5000 + '"a"' + ")" * 5000), "too large"),
    "chain of rules": (written(rules(8000)), "too large"),
    "rule of itself": (written("start: start"), "no text"),
}
# What is bounded without being refused: the limits are llguidance's own, for each token.
BOUNDED = {
    "a million items": json_schema({"type": "array", "items": {"const": 1}, "minItems": 10**6}),
    "a million repeats": regex("a{1000000}"),
    "nested repeats": regex("((((a{100}){100}){100}){100})"),
    "catastrophic": regex("(a+)+b"),
    "exponential automaton": regex("(a|b)*a(a|b){20}"),
    "many choices": choice([f"value number {i}" for i in range(4096)]),
    "many branches": json_schema({"anyOf": [{"const": [f"k{i}", i]} for i in range(500)]}),
    "many optional properties": json_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    ),
    "a recursive type": json_schema(
        {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"c": {"items": {"$ref": "#/$defs/n"}}}}}}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_much_is_refused(compiler: GrammarCompiler, name: str) -> None:
    grammar, words = HOSTILE[name]
    with pytest.raises(GrammarError, match=words):
        compiler.compile(grammar)
    assert compiler.compile(choice(["after it"])), "others are served"


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_large_but_cheap_goes_on(compiler: GrammarCompiler, name: str) -> None:
    matcher = compiler.compile(BOUNDED[name]).matcher({END})
    draw_text(matcher, Random(0), most=60)
    assert matcher.error is None


def test_a_grammar_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = GrammarCompiler(lambda: VOCABULARY, GrammarLimits(seconds=30))
    made.compile(json_object())
    process = made._process
    assert process is not None
    object.__setattr__(made.limits, "seconds", 1e-6)
    with pytest.raises(GrammarError, match="took more than 1e-06 s"):
        made.compile(regex("a+"))
    assert process.has_ended
    object.__setattr__(made.limits, "seconds", 30.0)
    with pytest.raises(GrammarError, match="took more than"):
        made.compile(regex("a+"))
    assert made._process is None, "what has failed is remembered: no process was started for it"
    assert made.compile(regex("b+"))
    assert made.pid != process.pid
    made.close()


def test_a_process_that_is_killed_is_replaced(compiler: GrammarCompiler) -> None:
    compiler.compile(choice(["before"]))
    process = compiler._process
    assert process is not None
    process.kill()
    process._process.wait()
    assert compiler.compile(choice(["behind"]))
    assert compiler._process is not process


class Killed:
    """A process that somebody ends while it compiles."""

    pid = 0
    has_ended = False

    def exchange(self, *_: object, **__: object) -> bytes:
        raise ProcessEnded("status -9", -9)


def test_a_process_that_is_killed_at_work_says_nothing_of_its_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    made = GrammarCompiler(lambda: VOCABULARY)
    made._process = Killed()  # type: ignore[assignment]
    assert made.compile(choice(["once"])), "another process compiles it"
    with monkeypatch.context() as patched:
        patched.setattr(made, "_running", lambda _: Killed())
        with pytest.raises(GrammarUnavailable, match="try again") as refused:
            made.compile(choice(["twice"]))
    assert refused.value.is_here
    assert made.compile(choice(["twice"])), "it was not remembered as refused"
    made.close()


def test_one_that_took_too_long_may_try_again_later() -> None:
    made = GrammarCompiler(lambda: VOCABULARY, GrammarLimits(seconds=30, slow_seconds=0))
    made.compile(json_object())
    object.__setattr__(made.limits, "seconds", 1e-6)
    with pytest.raises(GrammarError, match="took more than 1e-06 s"):
        made.compile(regex("a+"))
    object.__setattr__(made.limits, "seconds", 30.0)
    assert made.compile(regex("a+"))
    made.close()


def test_no_text_is_kept_of_what_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError):
        compiler.compile(regex("(" + "a" * 10_000))
    assert {len(key) for key in compiler._refused} == {32}


def test_what_is_kept_waits_for_nobody() -> None:
    seen: list[bool] = []
    made = GrammarCompiler(lambda: VOCABULARY, observe=lambda _, hit: seen.append(hit))
    assert made.ready(choice(["a"])) is None
    found = made.compile(choice(["a"]))
    with made._turn:  # another grammar is being compiled
        assert made.ready(choice(["a"])) is found
    assert seen == [False, True]
    made.close()


def test_grammars_are_kept_and_the_oldest_go() -> None:
    seen: list[bool] = []
    made = GrammarCompiler(lambda: VOCABULARY, GrammarLimits(kept=2), lambda _, hit: seen.append(hit))
    first = made.compile(choice(["a"]))
    assert made.compile(choice(["a"])) is first
    made.compile(choice(["b"]))
    assert made.compile(choice(["a"])) is first, "used again: not the oldest"
    made.compile(choice(["c"]))
    assert made.compile(choice(["a"])) is first
    made.compile(choice(["b"]))
    assert seen == [False, True, False, True, False, True, False]
    made.close()


def test_kept_texts_are_bounded() -> None:
    made = GrammarCompiler(lambda: VOCABULARY, GrammarLimits(kept_bytes=1000))
    for letter in "abc":
        made.compile(choice([letter * 600]))
    assert len(made._kept) == 1
    made.close()


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarUnavailable, match="not installed") as error:
        GrammarCompiler(lambda: VOCABULARY).compile(json_object())
    assert not error.value.is_here


def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "_WORKER", "guanaco.server.grammars.nothing")
    with pytest.raises(GrammarUnavailable, match="could not start") as error:
        GrammarCompiler(lambda: VOCABULARY).compile(json_object())
    assert error.value.is_here


def test_warming_up_leaves_nothing_slow_to_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Vocabulary] = []

    def make() -> Vocabulary:
        made.append(small_vocabulary())
        return made[-1]

    compiler = GrammarCompiler(make)
    compiler.warm_up()
    tokenizer = made[0].__dict__["tokenizer"]
    compiler.compile(json_object())
    assert len(made) == 1
    assert made[0].tokenizer is tokenizer
    compiler.close()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    GrammarCompiler(small_vocabulary).warm_up()


def test_several_threads_share_one_compiler(compiler: GrammarCompiler) -> None:
    results: list[Any] = []

    def work(number: int) -> None:
        for name in ("x", "y", f"z{number}"):
            results.append(compiler.compile(choice([name])).grammar)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 18


def test_matchers_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    """The same choices lead to the same text, whoever draws at the same time."""
    compiled = compiler.compile(json_object())
    alone = [draw_text(compiled.matcher({END}), Random(seed)).tokens for seed in range(4)]
    together: dict[int, list[int]] = {}

    def work(seed: int) -> None:
        together[seed] = draw_text(compiled.matcher({END}), Random(seed)).tokens

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(4)] == alone


def test_the_ends_are_the_requests_own(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(regex("ab*"))
    both, none = compiled.matcher({END, OTHER_END, 10**6}), compiled.matcher(())
    assert not {END, OTHER_END} & set(allowed(both)), "nothing is whole yet"
    for matcher in (both, none):
        matcher.accept(ord("a"))
    assert set(allowed(both)) == {ord("b"), END, OTHER_END}
    assert set(allowed(none)) == {ord("b")}
    assert [both.is_end(token) for token in (END, OTHER_END, ord("b"))] == [True, True, False]


def test_control_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    tokens = allowed(compiler.compile(regex("(.|\n)+")).matcher({END}))
    assert not {CONTROL, PADDING, END, OTHER_END} & set(tokens)
    assert len(tokens) > 128


def test_a_token_that_may_not_come_ends_the_matcher(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(choice(["yes"])).matcher({END})
    matcher.accept(ord("n"))
    assert matcher.error is ErrorCode.GRAMMAR_STUCK
    assert allowed(matcher) == []
    assert not matcher.is_complete


def test_an_automaton_that_is_full_is_renewed(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """All matchers of a grammar share it: the next request must not find it full."""
    monkeypatch.setattr(building, "_MAX_LEXER_STATES", 2000)
    grammar = regex("(.*a.{40}b.{40})+")
    full = compiler.compile(grammar)
    for seed in range(50):
        matcher = full.matcher({END})
        with contextlib.suppress(AssertionError):
            draw_text(matcher, Random(seed))
        if matcher.error is not None:
            break
    assert matcher.error is ErrorCode.GRAMMAR_TOO_COMPLEX
    fresh = compiler.compile(grammar)
    assert fresh is not full
    assert allowed(fresh.matcher({END}))
    assert compiler.compile(grammar) is fresh


def test_an_automaton_is_renewed_before_it_is_full(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "_RENEWED_AFTER", 3)
    grammar = choice(["renewed"])
    first = compiler.compile(grammar)
    for _ in range(3):
        assert compiler.compile(grammar) is first
        assert allowed(first.matcher({END}))
    second = compiler.compile(grammar)
    assert second is not first
    assert compiler.compile(grammar) is second


def test_a_limit_that_is_reached_later_is_told_as_one() -> None:
    """The first letter is common to all: only then there are too many places at once."""
    names = {f"p{i}": {"type": "string"} for i in range(1000)}
    grammar = json_schema({"type": "object", "properties": names})
    matcher = GrammarMatcher(build(lark_of(grammar), VOCABULARY, grammar.kind), VOCABULARY, {END})
    allowed(matcher)
    matcher.accept(ord("{"))
    allowed(matcher)
    assert matcher.error is ErrorCode.GRAMMAR_TOO_COMPLEX


def test_a_text_that_needs_a_missing_byte_is_stuck() -> None:
    """A vocabulary without the letter b: after a, nothing may follow."""
    vocabulary = Vocabulary(tuple(b"" if b"b" in token else token for token in VOCABULARY.tokens))
    grammar = regex("a+ b")
    matcher = GrammarMatcher(build(lark_of(grammar), vocabulary, grammar.kind), vocabulary, {END})
    for text in ("a", " "):
        assert ord(text) in allowed(matcher)
        matcher.accept(ord(text))
    assert allowed(matcher) == []
    assert matcher.error is ErrorCode.GRAMMAR_STUCK
    made = GrammarCompiler(lambda: vocabulary)
    with pytest.raises(GrammarError, match="this model's tokens can spell"):
        made.compile(grammar)
    made.close()


def test_a_matcher_is_freed(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(json_object()).matcher({END})
    allowed(matcher)
    gone = weakref.ref(matcher)
    del matcher
    gc.collect()
    assert gone() is None


def test_vocabularies_travel_whole() -> None:
    assert Vocabulary.unpacked(VOCABULARY.packed()) == VOCABULARY
    assert VOCABULARY.num_ids == NUM_IDS


def test_the_error_quotes_nothing(compiler: GrammarCompiler) -> None:
    secret = "SECRETWORD"
    for grammar in (
        regex(f"({secret}"),
        written(f"start: {secret}("),
        json_schema({"$ref": f"#/$defs/{secret}"}),
        json_schema({"type": secret}),
        json_schema({"required": secret}),
        json_schema({"pattern": f"{secret}["}),
    ):
        with pytest.raises(GrammarError) as error:
            compiler.compile(grammar)
        assert secret not in str(error.value)
        assert secret not in json.dumps(error.value.args)


def test_matcher_is_the_engines_constraint(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(choice(["ab"])).matcher({END})
    assert isinstance(matcher, GrammarMatcher)
    matcher.accept(ord("a"))
    assert not matcher.is_complete
    matcher.accept(ord("b"))
    assert matcher.is_complete
