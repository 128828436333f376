"""One request's tools, from its fields to its prompt and to the reader of its answers.

The room's entry: see the room's docstring. Messages and tools have the shape of OpenAI's chat. Called by the routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from guanaco.models.error_codes import ErrorCode
from guanaco.models.text.chat_template import ChatTemplate
from guanaco.models.text.tokenizer import Tokenizer
from guanaco.server.api.http.errors import bad_request
from guanaco.server.api.tools.default_prompt import tools_text, with_calls_as_text, with_tools_text
from guanaco.server.api.tools.definitions import Mode, Tool, ToolChoice
from guanaco.server.api.tools.forced import forced_calls, strict_calls
from guanaco.server.api.tools.formats.base import CallFormat, Marks
from guanaco.server.api.tools.formats.mistral import MISTRAL
from guanaco.server.api.tools.formats.registry import DEFAULT, FORMATS, format_of_template
from guanaco.server.api.tools.history import Message, check_history, one_call_a_message, with_mistral_ids
from guanaco.server.api.tools.reader import ToolCallReader
from guanaco.server.grammars.spec import Grammar, grammar_of_parts, one_of, part_of


@dataclass(frozen=True)
class ToolPlan:
    """A request's tools and how they are used. Without tools, it only brings earlier calls into shape."""

    tools: tuple[Tool, ...] = ()
    mode: Mode = "none"
    names: tuple[str, ...] = ()  # the functions that may be called
    parallel: bool = True  # whether an answer may have several calls
    setting: str = "auto"  # --tool-format
    template: ChatTemplate | None = None  # the template of the prompt
    tokenizer: Tokenizer | None = None
    is_sure: bool = False  # answers follow a grammar in which everything that begins as a call becomes one
    is_named: bool = False  # tool_choice names the function that must be called

    @property
    def num_bytes(self) -> int:
        """Roughly, the bytes of the tools' text in the prompt."""
        return sum(len(orjson.dumps(tool.shown)) for tool in self.shown)

    @property
    def shown(self) -> tuple[Tool, ...]:
        """The tools that the prompt describes. None if the model must not call: it would call tools that it sees."""
        return () if self.mode == "none" else self.tools

    @property
    def call_format(self) -> CallFormat:
        """The format of calls. The setting `none` only means that answers are not searched for calls."""
        if self.setting in FORMATS:
            return FORMATS[self.setting]
        return DEFAULT if self.setting == "none" or self.template is None else format_of_template(self.template.source)

    def prompt(self, messages: Sequence[Message]) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """(messages, tools) for the template. Raises a 400 if earlier calls and answers don't match, and
        TemplateError."""
        messages = check_history(messages)
        has_calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if self.template is None or not (self.shown or has_calls):
            return messages, None
        support, call_format = self.template.tool_support, self.call_format
        if has_calls and not (support.calls and support.results):
            messages = with_calls_as_text(messages, call_format)
        elif has_calls:
            messages = messages if support.many_calls else one_call_a_message(messages)
            messages = with_mistral_ids(messages) if call_format is MISTRAL else messages
        if not self.shown:
            return messages, None
        tools = [dict(tool.shown) for tool in self.shown]
        if support.tools:
            return messages, tools
        return with_tools_text(messages, tools_text(tools, call_format), takes_system=support.system), None

    def grammar(self, content: Grammar | None) -> Grammar | None:
        """The grammar of the answer; None for any text. content: the grammar that the request's other fields set.

        If calls are required, `response_format` has no effect. If they are allowed, the answer is either calls or
        content by `response_format`. With any other grammar in `content`, the answer follows that and has no calls.
        Raises a 400 if calls are required together with such a grammar, or if a schema can't be enforced.
        """
        tools = [(index, tool) for index, tool in enumerate(self.tools) if tool.name in self.names]
        many = self.parallel and not self.is_named
        if content is None and self.guides_text:
            return grammar_of_parts(strict_calls(tools, self.call_format, self._marks, many=many), param="tools")
        is_format = content is not None and content.param == "response_format"
        if not self.is_forced and not (is_format and self.reads_calls):
            return content
        if content is not None and not is_format:
            text = f"{content.param} and tool_choice both say what the answer must look like: give one of them"
            raise bad_request(text, content.param, ErrorCode.INVALID_GRAMMAR)
        calls = forced_calls(tools, self.call_format, self._marks, many=many, marker=self.begun is None)
        if self.is_forced or content is None:
            return grammar_of_parts(calls, param="tools")
        return grammar_of_parts(one_of(part_of(content), calls), param="response_format")

    @property
    def guides_text(self) -> bool:
        """Whether calls within a free text follow a grammar: they do if a tool is strict."""
        return (
            self.mode == "auto"
            and self.reads_calls
            and any(tool.strict for tool in self.tools if tool.name in self.names)
        )

    @property
    def _marks(self) -> Marks:
        return Marks(lambda _text: None) if self.tokenizer is None else Marks(self.tokenizer.control_id)

    @property
    def begun(self) -> int | None:
        """The control token with which calls begin, if the answer must be calls; otherwise None. The prompt ends with
        it: the model need not compute a token that is known."""
        call_format = self.call_format
        if self.tokenizer is None or not self.is_forced or call_format.bare is not None:
            return None
        return self.tokenizer.control_id(call_format.markers[0])

    @property
    def visible_ids(self) -> frozenset[int]:
        """The control tokens that calls are written with; empty if answers are not searched for calls."""
        if self.tokenizer is None or not self.reads_calls:
            return frozenset()
        ids = (self.tokenizer.control_id(text) for text in self.call_format.control_texts)
        return frozenset(token for token in ids if token is not None)

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be calls."""
        return self.mode == "required"

    @property
    def reads_calls(self) -> bool:
        """Whether answers are searched for calls."""
        return self.mode != "none" and bool(self.names) and (self.setting != "none" or self.is_forced)

    def reader(self) -> ToolCallReader | None:
        """A reader for one choice; None if answers are not searched for calls."""
        if not self.reads_calls:
            return None
        max_calls = None if self.parallel else 1
        reader = ToolCallReader(
            self.call_format, self.names, sure=self.is_sure, forced=self.is_forced, max_calls=max_calls
        )
        if self.begun is not None:
            reader.feed(self.call_format.markers[0])
        return reader


def plan_tools(
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    parallel: bool | None,
    *,
    template: ChatTemplate | None,
    tokenizer: Tokenizer | None,
    setting: str = "auto",
) -> ToolPlan:
    """The plan for a request's fields, which `definitions` has parsed. Raises a 400 if they contradict each other."""
    names = [tool.name for tool in tools]
    if not tools:
        if choice is not None and choice.mode == "required":
            raise bad_request("tool_choice asks for a call, but there are no tools", "tool_choice")
        return ToolPlan(setting=setting, template=template)
    if choice is not None and choice.names is not None and not set(choice.names) <= set(names):
        raise bad_request("tool_choice names a function that is not in tools", "tool_choice")
    mode: Mode = "auto" if choice is None else choice.mode
    allowed = names if choice is None or choice.names is None else list(choice.names)
    return ToolPlan(
        tuple(tools),
        mode,
        tuple(allowed),
        parallel=parallel is not False,
        setting=setting,
        template=template,
        tokenizer=tokenizer,
        is_named=choice is not None and choice.is_named,
    )
