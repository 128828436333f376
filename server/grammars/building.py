"""A `Grammar` → a matcher of llguidance in its first state. Runs in the compiler's process and in the server's.

The limits are llguidance's own, except _MAX_LEXER_STATES. Raises GrammarError; its message says what to change.
"""

import random
import re
from typing import Any

import numpy as np

from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.schemas import FORMATS
from guanaco.server.grammars.spec import Grammar
from guanaco.server.grammars.vocabulary import Vocabulary

# Without this line, llguidance would call the tokenizer for each text that a grammar forces.
HEADER = '%llguidance {"no_forcing": true}\n'
_TRIED_TOKENS = 16  # how many tokens `try_out` samples at most
_MAX_LEXER_STATES = 50_000  # per grammar, shared by all its matchers; a state takes half a kB


def lark_of(grammar: Grammar) -> str:
    """The grammar in llguidance's Lark. Raises GrammarError for an invalid GBNF grammar."""
    import llguidance
    from llguidance.gbnf_to_lark import any_to_lark

    match grammar.kind:
        case "regex":
            return f"{HEADER}start: /{llguidance.regex_to_lark(grammar.text)}/\n"
        case "grammar":
            try:
                return HEADER + str(any_to_lark(grammar.text))
            except Exception:  # the library raises nothing more specific, and its message would quote the grammar
                raise GrammarError("the grammar is neither Lark nor GBNF that can be read") from None
    return HEADER + grammar.text


def build(lark: str, vocabulary: Vocabulary, kind: str) -> Any:
    """An LLMatcher in its first state. Releases the interpreter's lock. Raises GrammarError."""
    import llguidance

    # llguidance's verbose errors would quote the grammar.
    limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, lark, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(explain(matcher.get_error(), kind))
    return matcher


def try_out(prototype: Any, vocabulary: Vocabulary, kind: str) -> None:
    """Sample some tokens at random: most grammars that are too complex fail here. Raises GrammarError."""
    matcher, draw = prototype.deep_copy(), random.Random(0)  # noqa: S311 - no secret
    mask = np.zeros(vocabulary.num_words, dtype=np.int32)
    for number in range(_TRIED_TOKENS):
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = mask & vocabulary.bits_for(kind)
        ids = np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little"))
        if matcher.is_error() or matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex"):
            raise GrammarError(explain(matcher.get_error() or "too complex", kind))
        if not len(ids):
            if number == 0:
                raise GrammarError(_NO_TEXT)
            return
        if not matcher.consume_token(int(ids[draw.randrange(len(ids))])):
            raise GrammarError(explain(matcher.get_error(), kind))
        if matcher.is_stopped() and not matcher.is_error():
            return


_NO_TEXT = "it allows no text, or none that this model's tokens can spell"
_TOO_LARGE = "it is too large or too complex for this server: simplify it"
_IN_SCHEMA = (
    (r"Unimplemented keys: \[([^\]]*)\]", None),
    (r"oneOf constraints are not supported", "oneOf has branches that may overlap, which this server cannot enforce: "
     "use anyOf, or give every branch a required property with its own const"),
    (r"Unknown format", f"format may be {', '.join(FORMATS)}"),
    (r"circular references", "a $ref that leads back to itself has other keywords beside it: put them into $defs"),
    (r"registry|Pointer|\$ref|URI", "a $ref leads nowhere: it must point into the schema itself, such as #/$defs/NAME"),
    (r"Unsatisfiable", "the schema allows no value: look at its limits, and at allOf"),
    (r"look-around|lookaround", "a pattern has look-around (?=…), which this server cannot enforce: write it without"),
    (r"regex", "a pattern is not a regular expression that can be read (the syntax of Rust's regex crate)"),
    (r"[Ii]nvalid type|must be|Expected|parse \"%json\"", "the schema is not a valid JSON Schema: look at its types"),
)  # fmt: skip
_IN_REGEX = (
    (r"look-around|lookaround|Word|Start|End", "it has look-around or word boundaries, which this server cannot "
     "enforce: write it without"),
    (r"backreferences", "it has backreferences, which no grammar can enforce: write it without"),
    (r".", "it is not a regular expression that can be read (the syntax of Rust's regex crate)"),
)  # fmt: skip
_IN_LARK = (
    (r"unknown special token", "it names a control token of the model: only text can be required"),
    (r"look-around|lookaround", "a regular expression in it has look-around, which this server cannot enforce"),
)
_LIMIT = re.compile(r"too (big|large|deep|complex|many)|fuel|recursion limit|max is|limit|exhausted|nest_limit|nesting")


def explain(error: str, kind: str) -> str:
    """Our message for an error of llguidance. It holds no client text; llguidance's own message quotes the grammar."""
    first = error.split("\n   1 | ", 1)[0]
    if _LIMIT.search(first.split('regex "')[0]) or "exceed the maximum" in first:
        return _TOO_LARGE
    if first.startswith("NoExtension"):
        return _NO_TEXT
    if kind == "regex":
        return _first(_IN_REGEX, first)
    if kind == "grammar":
        place = re.match(r"(?:at )?(\d+)\((\d+)\)", first)
        where = "" if place is None else f" (line {max(1, int(place[1]) - 1)}, column {place[2]})"
        return _first(_IN_LARK, first, "it is not a grammar that can be read") + where
    return _first(_IN_SCHEMA, first, "the schema cannot be enforced by this server: simplify it")


def _first(table: tuple[tuple[str, str | None], ...], error: str, otherwise: str = "it cannot be enforced") -> str:
    for pattern, text in table:
        if re.search(pattern, error):
            return text or "the schema uses keywords that this server cannot enforce: leave them out"
    return otherwise
