"""Our matcher against Python's `re`, on patterns drawn from the grammar that both have, and its bounds."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guanaco.adapters.peft.patterns import MAX_STATES, Budget, Matcher, PatternError

ATOMS = ["a", "b", "_", r"\.", ".", r"\d", r"\w", r"\W", "[ab]", "[^a.]", "[a-b_]", "[]a]", "[^]]", r"[\d.-]", "{", "1"]
ANCHORS = ["^", "$", r"\b", r"\B", r"\A", r"\Z"]
REPEATS = ["", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,2}", "{2,3}?"]


def repeated(items):
    return st.tuples(items, st.sampled_from(REPEATS)).map("".join)


def grow(inner):
    group = st.tuples(st.sampled_from(["(", "(?:"]), inner).map(lambda parts: f"{parts[0]}{parts[1]})")
    piece = st.one_of(repeated(group), repeated(st.sampled_from(ATOMS)), st.sampled_from(ANCHORS))
    sequence = st.lists(piece, max_size=4).map("".join)
    return st.lists(sequence, min_size=1, max_size=3).map("|".join)


PATTERNS = st.recursive(st.sampled_from(ATOMS), grow, max_leaves=8)
NAMES = st.text("ab_.1-", min_size=1, max_size=7)  # Python changed its mind about \\B on "" in 3.14


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pattern=PATTERNS, names=st.lists(NAMES, min_size=1, max_size=6))
def test_agrees_with_re(pattern, names):
    try:
        matcher = Matcher(pattern, Budget())
    except PatternError:  # of the generated ones, only the spellings of '{' that re takes for a character
        assert "{" in pattern
        return
    for name in names:
        assert matcher.fullmatch(name) == bool(re.fullmatch(pattern, name)), (pattern, name)


def test_bounds_of_repetitions():
    for low in range(4):
        for high in range(low, 5):
            matcher = Matcher(f"x(ab|c){{{low},{high}}}y", Budget())
            assert [n for n in range(7) if matcher.fullmatch(f"x{'c' * n}y")] == list(range(low, high + 1))


UNSLOTH = (
    r"(?:.*?(?:vision|image|language|text).*?(?:self_attn|attention|mlp|ffn).*?(?:q_proj|k_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp|ffn)\.(?:(?:q_proj|k_proj|down_proj)))"
)


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        r".*\.layers\.(1[0-9]|2[0-4])\..*_proj",
        r"(.*\.)?(^model.layers.1.mlp.up_proj)$",
        r"(?P<any>.*)down_proj",
    ],
)
def test_patterns_seen_in_the_wild(pattern):
    names = [f"model.layers.{i}.{m}" for i in range(30) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    matcher = Matcher(pattern, Budget())
    expected = [name for name in [*names, "lm_head"] if re.fullmatch(pattern, name)]
    assert expected
    assert [name for name in [*names, "lm_head"] if matcher.fullmatch(name)] == expected


@pytest.mark.parametrize(
    "pattern",
    [
        *[
            r"[\d-z]",
            "[a-\\d]",
            "(",
            ")",
            "(a",
            "a)",
            "[",
            "[a",
            "[b-a]",
            "*",
            "+a",
            "a**",
            "a{2}{3}",
            "a{3,2}",
            "a{65}",
            "a{x}",
            "a{",
            "\\",
        ],
        *["(?!a)", "(?=a)", "(?<=a)", "(?i)a", r"(a)\1", r"\p", "^*", "a*+", "a|*", r"[\W]", "é\\é", "(?#c)", "(?"],
        "(" * 50 + "a" + ")" * 50,
        "(((a{64}){64}){64}){64}",
        "a" * (MAX_STATES + 1),
    ],
)
def test_refused(pattern):
    with pytest.raises(PatternError):
        Matcher(pattern, Budget())


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*" * 8 + "x", "(a?){64}(a){64}b", ".*.*.*.*.*.*=.*"])
def test_bounded_where_backtracking_is_not(pattern):
    """On `re`, the worst of these would outlive the test run."""
    matcher = Matcher(pattern, Budget())
    assert not matcher.fullmatch("a" * 60)


def test_budget_is_shared_and_ends():
    budget = Budget(steps=2000)
    matchers = [Matcher("(.*)*x", budget) for _ in range(3)]

    def spend():
        for number in range(1000):
            matchers[number % 3].fullmatch(f"layers.{number}.y")

    with pytest.raises(PatternError, match="too long"):
        spend()
