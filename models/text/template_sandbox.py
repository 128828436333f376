"""The sandbox of chat templates: jinja2's immutable sandbox, set up as in transformers, and stricter.

Runs only in the process that `template_renderer` starts. This module limits what a template can reach; the process
limits its time and memory. Called by `template_worker`.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import TemplateError

# The most characters or items of a repetition, and bits of a power: "x" * 10**10 would take all memory.
_MAX_PRODUCT = 1 << 20
_MAX_MESSAGE_CHARS = 2000  # of an error message, whose text may come from the template

# The exceptions of template code that is wrong, or that does not fit the messages.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class SandboxedTemplate:
    """A compiled template. No rendering sees anything of an earlier one."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError that says where the source is wrong."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {error.message}"[:_MAX_MESSAGE_CHARS]) from error
        except (RecursionError, SyntaxError, ValueError) as error:
            raise TemplateError(f"it cannot be compiled: {error}"[:_MAX_MESSAGE_CHARS]) from error

    def render(self, variables: Mapping[str, Any], max_chars: int) -> str:
        """The rendered text. Raises TemplateError if the template refuses or fails, MemoryError if memory runs out."""
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > max_chars:
                    raise TemplateError(f"its output exceeds {max_chars} characters", ErrorCode.TEMPLATE_TOO_LARGE)
        except _TEMPLATE_FAULTS as error:
            raise TemplateError((str(error) or type(error).__name__)[:_MAX_MESSAGE_CHARS]) from error
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the text that a model is trained on. In a prompt it has no
    effect."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace, which refuses names with an underscore first: they would reach Python's internals."""

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
    """jinja2's sandbox, with errors for unsafe attributes and a limit on products and powers."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Raise an error for an unsafe attribute at once; jinja2 would raise it only when the attribute is used."""
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
    del environment.globals["lipsum"]  # makes any amount of dummy text
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
    """JSON without jinja2's HTML escapes, on which no model was trained."""
    pair = None if separators is None else tuple(separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)  # type: ignore[arg-type]
