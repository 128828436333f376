"""The HTTP side of `guanaco chat`: the models of a server, and streamed answers with their token counts and times."""

import http.client
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
        try:
            with self._open("/models") as reply:
                names = [card["id"] for card in json.load(reply)["data"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise CommandError(self._foreign("/models")) from None
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(self._lost(error)) from None
        if not all(isinstance(name, str) for name in names):
            raise CommandError(self._foreign("/models"))
        if not names:
            raise CommandError(f"{self.url}/models lists no model: check the key (--api-key) and the address (--url)")
        return names

    def stream(self, model: str, messages: Sequence[Mapping[str, str]], figures: AnswerFigures) -> Iterator[str]:
        """The pieces of one answer's text as they come. `figures` is filled on the way, its token counts at the end."""
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        try:
            with self._open("/chat/completions", body) as reply:
                figures.version = reply.headers.get("X-Adapter-Version")
                yield from _pieces_of(reply, figures)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise CommandError(self._foreign("/chat/completions")) from None
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(self._lost(error)) from None

    def _foreign(self, path: str) -> str:
        return (
            f"{self.url}{path} answered in another form than OpenAI's: check --url, and whether a proxy answers there"
        )

    def _lost(self, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return (
            f"{self.url} ended the connection before its answer was whole ({reason}): look at its log, then try again"
        )

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)  # noqa: S310  `server_root` lets http and https pass only
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise CommandError(_error_message(error)) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error).strip() or type(error).__name__
            raise CommandError(
                f"no server at {self.url} ({reason}): start one with `guanaco serve`, or pass --url"
            ) from None


def _pieces_of(reply: http.client.HTTPResponse, figures: AnswerFigures) -> Iterator[str]:
    """The pieces of a streamed answer; fills `figures`.

    Raises HTTPException or OSError if the connection ends before [DONE] or a finish reason, and CommandError for an
    error of the server. An event of another shape raises what reading it raises.
    """
    for raw in reply:
        line = raw.decode("utf-8").strip()
        if line == "data: [DONE]":
            return
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise CommandError(str(event["error"]["message"]))
        if event.get("usage"):
            figures.prompt_tokens = event["usage"]["prompt_tokens"]
            figures.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            figures.finish_reason = choice.get("finish_reason") or figures.finish_reason
            if piece := choice["delta"].get("content"):
                figures.last_piece = time.perf_counter()
                figures.first_piece = figures.first_piece or figures.last_piece
                yield piece
    if figures.finish_reason is None:
        raise http.client.IncompleteRead(b"")


def _error_message(error: urllib.error.HTTPError) -> str:
    """The message in the server's error body, if it has OpenAI's shape, otherwise the status."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return f"the server answered {error.code} {error.reason}"
