"""The required form of an answer as plain data: a `Grammar` is hashable, and equal requests make equal grammars.

All kinds but a client's own pattern or grammar are written in llguidance's dialect of Lark. Nothing is compiled here.
Raises GrammarError for errors that are visible without compiling; its message may be shown to a client. Called by
`requested` and by the API's tools.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guanaco.server.grammars.errors import GrammarError
from guanaco.server.grammars.schemas import lark_json
from guanaco.server.grammars.vocabulary import CALLS

MAX_CHOICES = 4096
MAX_REPEATS = 128
_ANY_TEXT = r"ANY_TEXT: /(.|\n)*/"


@dataclass(frozen=True)
class Grammar:
    """One grammar.

    kind: json_object, json_schema, regex, choice, grammar or tools. text: Lark; for a regex the pattern; for a client's
    own grammar Lark or GBNF. param: the request's field that set it, for errors.
    """

    kind: str
    text: str
    param: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Part:
    """A piece of a grammar: a Lark expression, and the rules that it needs. Rules are named by a hash of their
    content."""

    expression: str
    rules: tuple[str, ...] = ()


def json_object() -> Grammar:
    """Any JSON object."""
    return grammar_of_parts(schema({"type": "object"}), kind="json_object")


def json_schema(value: Mapping[str, Any] | bool, *, compact: bool = False) -> Grammar:
    """JSON that is valid by a schema. compact: without spaces; otherwise one may follow each comma and colon."""
    return grammar_of_parts(schema(value, compact=compact), kind="json_schema")


def regex(pattern: str) -> Grammar:
    """A text that the whole pattern matches, in the syntax of Rust's regex crate."""
    if not pattern:
        raise GrammarError("the regular expression is empty: write one that matches the answer")
    return Grammar("regex", pattern)


def choice(options: Sequence[str]) -> Grammar:
    """One of these texts, exactly."""
    if not options or not all(isinstance(option, str) and option for option in options):
        raise GrammarError("give a list of at least one text, none of them empty")
    if len(options) > MAX_CHOICES:
        raise GrammarError(f"at most {MAX_CHOICES} choices")
    # One terminal. As alternatives of a rule, each would take one of the parser's 2,000 items.
    texts = " | ".join(literal(option).expression for option in dict.fromkeys(options))
    return grammar_of_parts(Part("CHOICE", (f"CHOICE: {texts}",)), kind="choice")


def written(text: str) -> Grammar:
    """A client's own grammar: Lark in llguidance's dialect, or GBNF as in llama.cpp and xgrammar."""
    if not text.strip():
        raise GrammarError("the grammar is empty: write Lark or GBNF")
    if "%llguidance" in text:
        raise GrammarError("%llguidance is not for a request's grammar: leave the line out")
    return Grammar("grammar", text)


def literal(text: str) -> Part:
    """Exactly this text. It never becomes a control token."""
    return Part(json.dumps(text))


def schema(value: Mapping[str, Any] | bool, *, compact: bool = False) -> Part:
    """JSON that is valid by a schema; see `json_schema`."""
    rule = "%json " + lark_json(value, compact=compact)
    name = f"json_{_digest(rule)}"
    return Part(name, (f"{name}: {rule}",))


def in_order(*parts: Part) -> Part:
    """One part after the other."""
    return Part("(" + " ".join(part.expression for part in parts) + ")", _rules(parts))


def one_of(*parts: Part) -> Part:
    """Any one of the parts."""
    assert parts, "a choice of nothing"
    return Part("(" + " | ".join(part.expression for part in parts) + ")", _rules(parts))


def repeated(part: Part, *, separator: str, least: int = 1, most: int = MAX_REPEATS) -> Part:
    """The part `least` to `most` times, with `separator` between; least is 1 or more."""
    assert 1 <= least <= most <= MAX_REPEATS, (least, most)
    name = f"item_{_digest(part.expression)}"
    more = f"({literal(separator).expression} {name}){{{least - 1},{most - 1}}}" if most > 1 else ""
    return Part(f"({name} {more})", (*part.rules, f"{name}: {part.expression}"))


def followed(part: Part, more: Part, *, most: int) -> Part:
    """The part, followed by up to `most` times another part; most is 1 or more."""
    assert 1 <= most <= MAX_REPEATS, most
    name = f"more_{_digest(more.expression)}"
    return Part(f"({part.expression} {name}{{0,{most}}})", (*_rules((part, more)), f"{name}: {more.expression}"))


def control_token(token_id: int) -> Part:
    """The control token itself, not a text. It must be among the vocabulary's marks (`vocabulary.Vocabulary`)."""
    return Part(f"<[{token_id}]>")


def matching(pattern: str) -> Part:
    """The longest text that a regular expression matches. The pattern is ours, never a client's, and has no slash."""
    name = f"MATCH_{_digest(pattern).upper()}"
    return Part(name, (f"{name}: /{pattern}/",))


def any_text() -> Part:
    """Any text, which may be empty."""
    return Part("ANY_TEXT", (_ANY_TEXT,))


def text_until(end: str, before: Part | None = None) -> Part:
    """Any text, or one that `before` matches, up to and including the first `end`. The next part must follow there."""
    text = any_text() if before is None else before
    name = f"until_{_digest(text.expression + end)}"
    return Part(name, (*text.rules, f"{name}[lazy]: {text.expression} {literal(end).expression}"))


def at_will(part: Part, *, many: bool) -> Part:
    """The part or nothing; with `many`, as often as the model likes."""
    return Part(f"({part.expression}){'*' if many else '?'}", part.rules)


def optional(part: Part) -> Part:
    """The part or nothing."""
    return at_will(part, many=False)


def grammar_of_parts(part: Part, *, kind: str = CALLS, param: str | None = None) -> Grammar:
    """A part as a whole grammar. param: the request's field that set it, for errors."""
    return Grammar(kind, "\n".join((f"start: {part.expression}", *dict.fromkeys(part.rules), "")), param)


def part_of(grammar: Grammar) -> Part:
    """A grammar that was made of parts, as a part of another grammar."""
    start, *rules = grammar.text.splitlines()
    assert start.startswith("start: "), "a grammar that a client wrote is no part"
    return Part(start.removeprefix("start: "), tuple(rules))


def _rules(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule for part in parts for rule in part.rules))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
