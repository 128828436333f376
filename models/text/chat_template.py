"""Chat templates: messages → prompt text. Templates run in a process that can be replaced.

Knows nothing of token ids, and never runs a template's code in this process: `template_renderer` starts another one.
Called by `tokenizer`. Our own templates are in `named_templates`.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from guanaco.models.error_codes import ErrorCode
from guanaco.models.errors import TemplateError
from guanaco.models.formats.small_files import MAX_TEMPLATE_FILE_BYTES, read_small
from guanaco.models.text.named_templates import NAMED
from guanaco.models.text.template_renderer import MAX_OUTPUT_CHARS, TemplateRenderer, shared_renderer
from guanaco.models.text.template_tools import ToolSupport, find_tool_support

__all__ = [
    "MAX_OUTPUT_CHARS",
    "MAX_TEMPLATE_CHARS",
    "TEMPLATE_NAMES",
    "ChatTemplate",
    "TemplateError",
    "load_template",
    "named_template",
]

TEMPLATE_NAMES = frozenset(NAMED)
MAX_TEMPLATE_CHARS = 1 << 20  # the largest in use, with tools and documents, have about 20,000 characters
_TRIAL = ({"role": "user", "content": "Hello!"},)
_TRIAL_CHARS = 1 << 20
# Errors of a template that took too much time or memory. If the trial does so, every conversation would.
_OVERRUNS = (ErrorCode.TEMPLATE_TIMEOUT, ErrorCode.TEMPLATE_TOO_LARGE, ErrorCode.TEMPLATE_CRASHED)


class ChatTemplate:
    """A chat template that compiles. Safe to use from several threads."""

    def __init__(
        self,
        source: str,
        *,
        is_complete: bool = True,
        stop_strings: Sequence[str] = (),
        name: str = "",
        renderer: TemplateRenderer | None = None,
    ) -> None:
        """Compile `source`. Raises TemplateError that says where it is wrong.

        is_complete: the template itself writes the token that begins a text (if there is one), as models' templates do.
        stop_strings: texts that a model trained on this format writes after the place where it should have stopped.
        renderer: the processes that render it; None: the program's shared ones.
        """
        self.source = source
        self.is_complete = is_complete
        self.stop_strings = tuple(stop_strings)
        self.notes: tuple[str, ...] = ()  # for the operator
        self._label = f"chat template {name}".strip()
        self._renderer = renderer or shared_renderer()
        self._digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"{self._label}: it has {len(source)} characters; at most {MAX_TEMPLATE_CHARS} are read"
            )
        try:
            self._renderer.compile(self._digest, source)
        except TemplateError as error:
            raise self._labelled(error) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_generation_prompt: bool = True,
        special_tokens: Mapping[str, str] | None = None,
        max_chars: int = MAX_OUTPUT_CHARS,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt. A message has "role", "content" and perhaps more keys; keys whose value is None are left out.

        tools: functions in the form of OpenAI's API, {"type": "function", "function": {…}}; None: no tools.
        special_tokens: further named tokens, such as unk_token. max_chars: a longer prompt is an error.
        continue_final_message: the prompt ends with the last message's text, as in transformers.
        variables: further variables of JSON's types for the template; they replace none of the others.
        Raises TemplateError, with the template's own message if it refuses the conversation.
        """
        tokens = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        shown = [dict(message) for message in messages]
        tag = _tag() if continue_final_message else ""
        if continue_final_message:
            shown[-1]["content"] = shown[-1]["content"] + tag + " "
        values = {
            **{name: _plain(value) for name, value in variables.items()},
            "messages": [{key: _plain(v) for key, v in message.items() if v is not None} for message in shown],
            "tools": None if tools is None else [_plain(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            # An absent token stays undefined, for which templates can test. A None would be printed as "None".
            **{name: token for name, token in tokens.items() if token is not None},
        }
        try:
            text = self._renderer.render(self._digest, self.source, values, max_chars)
        except TemplateError as error:
            raise self._labelled(error) from None
        return self._cut(text, messages[-1]["content"], tag) if continue_final_message else text

    def _cut(self, text: str, final: str, tag: str) -> str:
        """The rendered text up to the tag that follows the last message's text. Raises TemplateError if it lacks it."""
        place = text.rfind(tag)
        if place < 0 or final.strip() not in text:
            problem = "it leaves out the last message, or a part of it, so that message can't be continued"
            raise TemplateError(f"{self._label}: {problem}")
        keeps_spaces = text.startswith(tag + " ", place)  # else the template trims them, and would do so here
        return text[:place] if keeps_spaces else text[:place].rstrip()

    def try_out(self, special_tokens: Mapping[str, str]) -> None:
        """Render one question. If the template refuses it, `notes` says so: it may accept other conversations.

        special_tokens: all named tokens. Raises TemplateError if the template exceeds its time, memory or output, since
        every conversation would.
        """
        try:
            self.render(_TRIAL, special_tokens=special_tokens, max_chars=_TRIAL_CHARS)
        except TemplateError as error:
            if error.code in _OVERRUNS:
                raise
            could_not_try = error.code == ErrorCode.TEMPLATE_UNAVAILABLE
            what = "could not be tried" if could_not_try else "was tried with one question and refused it"
            self.notes = (f"it {what}: {error}",)

    @cached_property
    def tool_support(self) -> ToolSupport:
        """Which parts of tool use the template writes itself, found by trial. Raises TemplateError if a trial exceeds
        its limits."""
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
            try:
                return self.render(messages, tools=tools, special_tokens=tokens, max_chars=_TRIAL_CHARS)
            except TemplateError as error:
                if error.code != ErrorCode.TEMPLATE_ERROR:
                    raise
                return ""

        return find_tool_support(render)

    def _labelled(self, error: TemplateError) -> TemplateError:
        return TemplateError(f"{self._label}: {error}", error.code)


@lru_cache
def named_template(name: str) -> ChatTemplate:
    """Our own template of this name. For an unknown name, raises TemplateError that lists the names."""
    if name not in NAMED:
        raise TemplateError(f"no chat template is called {name!r}: give {', '.join(NAMED)}, or a Jinja file")
    named = NAMED[name]
    return ChatTemplate(named.source, is_complete=False, stop_strings=named.stop_strings, name=name)


def load_template(name_or_path: str) -> ChatTemplate:
    """Our own template of this name, or a template from a Jinja file. Raises TemplateError.

    A file's template counts as complete (see `ChatTemplate`) and is tried out.
    """
    if name_or_path in NAMED:
        return named_template(name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        return named_template(name_or_path)
    try:
        source = read_small(path, MAX_TEMPLATE_FILE_BYTES).decode("utf-8")
    except OSError as error:
        raise TemplateError(f"the chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TemplateError(f"the chat template {path} cannot be read: {error}") from error
    template = ChatTemplate(source, name=str(path))
    template.try_out({"bos_token": "<s>", "eos_token": "</s>"})
    return template


def _tag() -> str:
    """A random text that no message can contain; it marks where the last message's text ends."""
    return f"CONTINUE{secrets.token_hex(16)}"


def _plain(value: Any) -> Any:
    """A copy made of JSON's types only, so that no object with methods of its own gets into a template."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    raise TemplateError(f"a message holds a {type(value).__name__}; only text, numbers, lists and objects are allowed")
