"""Chat templates: messages → prompt text, in jinja2's immutable sandbox, set up as transformers does.

Knows nothing of token ids. Called by `tokenizer`; templates of our own are in `named_templates`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from guanaco.models.named_templates import NAMED

TEMPLATE_NAMES = frozenset(NAMED)
MAX_TEMPLATE_CHARS = 1 << 20  # the largest in use, with tools and documents, have some 20,000
MAX_OUTPUT_CHARS = 1 << 26
# A product of text or lists may not be longer, nor a power have more bits: "x" * 10**10 is a way to take all memory.
_MAX_PRODUCT = 1 << 20

# What code in a template raises when it does not suit the messages, or is wrong in itself.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateError(Exception):
    """A chat template that is wrong, refuses the messages, or does what the sandbox does not allow."""


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(
        self, source: str, *, is_complete: bool = True, stop_strings: Sequence[str] = (), name: str = ""
    ) -> None:
        """Compile `source`. Raises TemplateError that says where it is wrong.

        is_complete: it writes the token that begins a text itself, if there is to be one, as templates of models do.
        stop_strings: what a model that was trained on this format writes where it should have stopped.
        """
        self.source = source
        self.is_complete = is_complete
        self.stop_strings = tuple(stop_strings)
        self._label = f"chat template {name}".strip()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"{self._label}: it has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are read"
            )
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{self._label}: line {error.lineno}: {error.message}") from error
        except (RecursionError, ValueError) as error:
            raise TemplateError(f"{self._label} cannot be compiled: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """The prompt. A message is {"role": …, "content": …} and more; keys whose value is None are left out.

        special_tokens: more of a tokenizer's named tokens, such as unk_token. Raises TemplateError with the template's
        own words where it refuses, and for anything else that goes wrong in it.
        """
        tokens = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        variables = {
            "messages": [{key: _plain(v) for key, v in message.items() if v is not None} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            # Absent ones stay undefined, which templates can ask for; they would print None.
            **{name: token for name, token in tokens.items() if token is not None},
        }
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise TemplateError(f"{self._label}: its output exceeds {MAX_OUTPUT_CHARS} characters")
        except _TEMPLATE_FAULTS as error:
            raise TemplateError(f"{self._label}: {str(error) or type(error).__name__}") from error
        return "".join(parts)


@lru_cache
def named_template(name: str) -> ChatTemplate:
    """One of our own templates. Raises TemplateError that lists them for another name."""
    if name not in NAMED:
        raise TemplateError(f"no chat template is called {name!r}: give {', '.join(NAMED)}, or a Jinja file")
    named = NAMED[name]
    return ChatTemplate(named.source, is_complete=False, stop_strings=named.stop_strings, name=name)


def load_template(name_or_path: str) -> ChatTemplate:
    """A template by its name, or from a Jinja file; a file counts as complete. Raises TemplateError."""
    if name_or_path in NAMED:
        return named_template(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        return named_template(name_or_path)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the chat template {path} cannot be read: {error}") from error
    return ChatTemplate(source, name=str(path))


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model is trained on; for a prompt it is nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace without underscored names, which would be Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        for name in dict(*args, **kwargs):
            _refuse_internal(name)
        Namespace.__init__(self, *args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, stricter where jinja2 is lenient, with a bound on what one product can make."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """An unsafe attribute is an error at once; jinja2 prints nothing for it and complains only at its next use."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        return super().call_binop(context, operator, left, right)


def _check_product(left: Any, right: Any) -> None:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int) and len(sequence) * count > _MAX_PRODUCT:
            raise SecurityError("a repetition is too long")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > _MAX_PRODUCT:
        raise SecurityError("a power is too large")


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]  # any amount of text, for layouts of web pages
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_SafeNamespace)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Iterable[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, which no model has seen."""
    pair = None if separators is None else tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """A copy made of JSON's types only: nothing with methods of its own gets into a template."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    raise TemplateError(f"a message holds a {type(value).__name__}; only text, numbers, lists and objects are allowed")
