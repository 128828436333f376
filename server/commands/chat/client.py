"""The HTTP side of `guanaco chat`: the models of a server, and streamed answers with their token counts and times."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guanaco.server.commands.common import bearer, server_root
from guanaco.server.errors import CommandError

_TIMEOUT_SECONDS = 600.0


@dataclass
class AnswerFigures:
    """The figures of one answer, complete after the last piece of its text. Times are in seconds."""

    started: float
    first_piece: float | None = None
    last_piece: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    version: str | None = None
    finish_reason: str | None = None

    def line(self) -> str:
        """One line for people: tokens, tokens per second after the first one, time to the first, adapter version."""
        parts = []
        tokens = self.completion_tokens
        if tokens is not None:
            parts.append(f"{tokens} tokens")
        if self.first_piece is not None and self.last_piece is not None:
            seconds = self.last_piece - self.first_piece
            if tokens is not None and tokens > 1 and seconds > 0:
                parts.append(f"{(tokens - 1) / seconds:.1f} tokens/s")
            parts.append(f"first after {self.first_piece - self.started:.2f} s")
        if self.version is not None:
            parts.append(f"version {self.version}")
        if self.finish_reason == "length":
            parts.append("cut off at --max-tokens or the end of the context")
        return " · ".join(parts)


class ChatClient:
    """Requests to one server. Every failure is a CommandError with the server's or the network's message."""

    def __init__(self, url: str, *, api_key: str | None, options: Mapping[str, Any]) -> None:
        self.url = f"{server_root(url)}/v1"
        self._headers: dict[str, Any] = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = bearer(api_key, "--api-key")
        self._options = dict(options)

    def models(self) -> list[str]:
        """The names that this key may use, the base first."""
        with self._open("/models") as reply:
            return [card["id"] for card in json.load(reply)["data"]]

    def stream(self, model: str, messages: Sequence[Mapping[str, str]], figures: AnswerFigures) -> Iterator[str]:
        """The pieces of one answer's text as they come. `figures` is filled on the way, its token counts at the end."""
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        with self._open("/chat/completions", body) as reply:
            figures.version = reply.headers.get("X-Adapter-Version")
            for raw in reply:
                line = raw.decode("utf-8").strip()
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise CommandError(event["error"]["message"])
                if event.get("usage"):
                    figures.prompt_tokens = event["usage"]["prompt_tokens"]
                    figures.completion_tokens = event["usage"]["completion_tokens"]
                for choice in event.get("choices", ()):
                    figures.finish_reason = choice.get("finish_reason") or figures.finish_reason
                    if piece := choice["delta"].get("content"):
                        figures.last_piece = time.perf_counter()
                        figures.first_piece = figures.first_piece or figures.last_piece
                        yield piece

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)  # noqa: S310  `server_root` lets http and https pass only
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise CommandError(_error_message(error)) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise CommandError(
                f"no server at {self.url} ({reason}): start one with `guanaco serve`, or pass --url"
            ) from None


def _error_message(error: urllib.error.HTTPError) -> str:
    """The message in the server's error body, if it has OpenAI's shape, otherwise the status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"
