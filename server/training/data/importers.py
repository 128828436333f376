"""The formats of training data: for each of them an importer makes a `Row` (`rows.py`) from a row's JSON object.

Knows no files and no tokens. An importer raises RowError with a reason for a row that can't be trained on. Called by
`reading`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guanaco.models.formats.shown import shown
from guanaco.server.training.data.rows import Message, RefusalKind, Row, RowError

# The names that --format takes. `guanaco` is a text with the headings ### Human: and ### Assistant:.
FORMATS = ("messages", "alpaca", "sharegpt", "completion", "text", "guanaco")
_HEADING = re.compile(r"(?<!#)###[ \t]*(Human|Assistant):[ \t]?")
_SPEAKERS = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_NO_TOOLS = "training on tool calls is not supported: leave tools, tool_calls and messages of the role tool out"


def detect_format(fields: Mapping[str, Any]) -> str:
    """The format of a row, by its fields. Raises RowError, which lists the fields of all formats."""
    if "messages" in fields:
        return "messages"
    if "conversations" in fields or "conversation" in fields:
        return "sharegpt"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "prompt" in fields and "completion" in fields:
        return "completion"
    if isinstance(text := fields.get("text"), str):
        return "guanaco" if is_guanaco_text(text) else "text"
    names = ", ".join(shown(name) for name in list(fields)[:6]) or "none"
    raise RowError(
        RefusalKind.BAD_FIELDS,
        f"no known format has these fields ({names}); write messages, conversations, instruction and output, "
        "prompt and completion, or text",
    )


def is_guanaco_text(text: str) -> bool:
    """Whether a text has both headings, `### Human:` and `### Assistant:`."""
    return {match[1] for match in _HEADING.finditer(text)} == {"Human", "Assistant"}


def import_row(format_name: str, fields: Mapping[str, Any], line: int) -> Row:
    """The row that an object of the format `format_name` stands for. Raises RowError if it can't be trained on."""
    return _IMPORTERS[format_name](fields, line)


def _messages(fields: Mapping[str, Any], line: int) -> Row:
    """OpenAI's and TRL's `{"messages": [{"role": …, "content": …}]}`; `weight` 0 keeps an answer from being learned."""
    if fields.get("tools") or fields.get("functions"):
        raise RowError(RefusalKind.UNSUPPORTED, _NO_TOOLS)
    return _conversation([_message(value, "role", "content") for value in _list(fields, "messages")], line)


def _sharegpt(fields: Mapping[str, Any], line: int) -> Row:
    """`{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}`."""
    name = "conversations" if "conversations" in fields else "conversation"
    turns = _list(fields, name)
    keys = ("role", "content") if turns and isinstance(turns[0], dict) and "role" in turns[0] else ("from", "value")
    messages = [_message(value, *keys) for value in turns]
    if fields.get("system"):
        messages.insert(0, Message("system", _text(fields, "system")))
    return _conversation(messages, line)


def _alpaca(fields: Mapping[str, Any], line: int) -> Row:
    """`{"instruction": …, "input": …, "output": …}`, and perhaps `system` and `history` ([[question, answer], …])."""
    messages = [Message("system", _text(fields, "system"))] if fields.get("system") else []
    for turn in _list(fields, "history") if fields.get("history") else ():
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise RowError(RefusalKind.BAD_FIELDS, "history must be a list of [question, answer]")
        messages += [Message("user", turn[0]), Message("assistant", turn[1], learned=True)]
    question = _text(fields, "instruction")
    if fields.get("input"):
        question = f"{question}\n\n{_text(fields, 'input')}" if question else _text(fields, "input")
    return _conversation(
        [*messages, Message("user", question), Message("assistant", _text(fields, "output"), True)], line
    )


def _completion(fields: Mapping[str, Any], line: int) -> Row:
    """`{"prompt": …, "completion": …}`: plain texts without a chat template, or two lists of messages with it."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        given = [_message(value, "role", "content", learned=False) for value in prompt]
        return _conversation([*given, *(_message(value, "role", "content") for value in completion)], line)
    prompt, completion = _text(fields, "prompt"), _text(fields, "completion")
    if not completion.strip():
        raise RowError(RefusalKind.EMPTY_ANSWER, "the completion is empty: write one, or remove the row")
    return Row(line, prompt=prompt, text=completion)


def _plain(fields: Mapping[str, Any], line: int) -> Row:
    """`{"text": …}`: the whole text is learned, without a chat template."""
    text = _text(fields, "text")
    if not text.strip():
        raise RowError(RefusalKind.NOTHING_TO_LEARN, "the text is empty: write one, or remove the row")
    return Row(line, text=text)


def _guanaco(fields: Mapping[str, Any], line: int) -> Row:
    """`{"text": "### Human: …### Assistant: …"}`: cut into messages at its headings."""
    text = _text(fields, "text")
    headings = list(_HEADING.finditer(text))
    if not headings:
        raise RowError(RefusalKind.BAD_FIELDS, "the text has no ### Human: and ### Assistant: headings")
    before = text[: headings[0].start()].strip()
    messages = [Message("system", before)] if before else []
    ends = [match.start() for match in headings[1:]] + [len(text)]
    for match, end in zip(headings, ends, strict=True):
        role = "user" if match[1] == "Human" else "assistant"
        messages.append(Message(role, text[match.end() : end].strip(), learned=role == "assistant"))
    return _conversation(messages, line)


_IMPORTERS: Mapping[str, Callable[[Mapping[str, Any], int], Row]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "completion": _completion,
    "text": _plain,
    "guanaco": _guanaco,
}


def _message(value: Any, role_key: str, content_key: str, *, learned: bool = True) -> Message:
    if not isinstance(value, dict):
        raise RowError(RefusalKind.BAD_FIELDS, f"each message must be an object with {role_key} and {content_key}")
    name, content = value.get(role_key), value.get(content_key)
    if value.get("tool_calls") or value.get("function_call") or name in ("tool", "function", "function_call"):
        raise RowError(RefusalKind.UNSUPPORTED, _NO_TOOLS)
    role = _SPEAKERS.get(name) if isinstance(name, str) else None
    if role is None:
        names = "system, user, assistant" if role_key == "role" else "system, human, gpt"
        raise RowError(RefusalKind.BAD_FIELDS, f"a message's {role_key} is {shown(str(name))}: write one of {names}")
    if isinstance(content, list):
        content = _joined(content)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise RowError(RefusalKind.BAD_FIELDS, f"a message's {content_key} must be text")
    weight = value.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(RefusalKind.BAD_FIELDS, "a message's weight must be 0 (not learned) or 1 (learned)")
    return Message(role, content, learned=learned and role == "assistant" and weight == 1)


def _joined(parts: Sequence[Any]) -> str:
    """The text of a content that is a list of parts."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type", "text") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise RowError(RefusalKind.UNSUPPORTED, "a message holds a part that is no text: leave images and audio out")
    return "".join(str(text) for text in texts)


def _conversation(messages: Sequence[Message], line: int) -> Row:
    """A row of these messages. Raises RowError if roles do not alternate, an answer is empty, or none is learned."""
    if not messages:
        raise RowError(RefusalKind.NOTHING_TO_LEARN, "there are no messages: write some, or remove the row")
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        wanted = "user" if number % 2 == 0 else "assistant"
        if message.role != wanted:
            raise RowError(
                RefusalKind.ROLES,
                f"after an optional system message the roles must alternate, user first: turn {number + 1} is of the "
                f"role {message.role}, and must be of the role {wanted}",
            )
        if wanted == "assistant" and not message.content.strip():
            raise RowError(
                RefusalKind.EMPTY_ANSWER, f"the answer in turn {number + 1} is empty: write it, or remove the row"
            )
    if len(turns) % 2:
        raise RowError(RefusalKind.ROLES, "the last message must be the assistant's: add the answer, or remove the row")
    if not any(message.learned for message in messages):
        raise RowError(
            RefusalKind.NOTHING_TO_LEARN, "no answer is learned: give one of them the weight 1, or remove the row"
        )
    return Row(line, messages=tuple(messages))


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise RowError(RefusalKind.BAD_FIELDS, f"{name} must be a list")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise RowError(RefusalKind.BAD_FIELDS, f"{name} must be text")
    return value
