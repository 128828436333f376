"""The fields of a body that a route ignores: collected, counted, and named in a header of the answer.

The names come from the client, so they are cleaned and cut before they go into a header. `fields` has the lists of
known fields; `serving` and `tokens` send the header.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from guanaco.server.api.generation.fields import HARMLESS_IN_STREAM_OPTIONS, RouteFields

HEADER = "X-Ignored-Fields"
MAX_NAMES = 16  # in the header; the number of the others follows as "+N"
MAX_NAME_CHARS = 48
_OTHER = re.compile(r"[^A-Za-z0-9_.\-]")

_IN_STREAM_OPTIONS = frozenset(("include_usage", "continuous_usage_stats")) | HARMLESS_IN_STREAM_OPTIONS


@dataclass(frozen=True)
class Ignored:
    """How many fields of one body were ignored, and the header's value that names them."""

    count: int = 0
    header: str | None = None

    def and_also(self, name: str) -> "Ignored":
        """A copy that names one more ignored thing, for example a header.

        `name` goes unchanged into the answer's header, so it must be a constant of ours, never the client's text.
        """
        return Ignored(self.count + 1, name if self.header is None else f"{self.header}, {name}")

    def name_in(self, response: Response) -> None:
        """Set the header of an answer, if any field was ignored."""
        if self.header is not None:
            response.headers[HEADER] = self.header


def ignored_fields(data: Mapping[str, Any], route: RouteFields) -> Ignored:
    """The fields of a body that are on no list, nested ones as `messages.name`. Fields that are null don't count."""
    names: dict[str, None] = {}
    for name in _names(data, route):
        names.setdefault(_OTHER.sub("?", name[:MAX_NAME_CHARS]) or "?")
    if not names:
        return Ignored()
    shown = list(names)[:MAX_NAMES]
    if len(names) > len(shown):
        shown.append(f"+{len(names) - len(shown)}")
    return Ignored(len(names), ", ".join(shown))


def _names(data: Mapping[str, Any], route: RouteFields) -> Iterator[str]:
    yield from route.ignored(name for name, value in data.items() if value is not None)
    if isinstance(options := data.get("stream_options"), dict):
        yield from (f"stream_options.{name}" for name in options if name not in _IN_STREAM_OPTIONS)
    messages = data.get(route.conversation)
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        at = route.conversation
        yield from (f"{at}.{name}" for name, value in message.items() if _counts(name, value, route.in_message))
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield from (
                    f"{at}.content.{name}" for name, value in part.items() if _counts(name, value, route.in_part)
                )


def _counts(name: str, value: object, known: frozenset[str]) -> bool:
    return value is not None and name not in known
